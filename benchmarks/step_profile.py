"""Say where the time of an optimiser step goes, operator by operator; the last line is JSON.

    python benchmarks/step_profile.py --results results/training
    python benchmarks/step_profile.py --variants lora dora --rounds 3

The variants are those of training.py, stepped in rounds under torch's profiler. Milliseconds are of
one step: an operator's own time without what it calls, the median over rounds. A part is a function
with all that it calls. Profiling adds about a microsecond to every call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from command_line import command_line
from torch.profiler import ProfilerActivity, profile
from training import make, prepare, select
from training import parse as training_options

from furina.errors import FurinaError
from furina.records.environment import provenance
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text

PARTS = {
    "_LowRankProduct": "W x and the update",
    "_LowRankProductBackward": "its backward",
    "_Directions": "norms, B̃ and M",
    "_DirectionsBackward": "their backward",
    "_Activity": "activity",
    "_ActivityBackward": "its backward",
    "aten::_fused_adamw_": "AdamW",
}
"""Functions whose time is told with all that they call."""
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_")
OWN = ("_Directions", "_DirectionsBackward", "_Activity", "_ActivityBackward")
"""Parts that a step of FURINA has and one of LoRA has not."""
Profile = dict[str, dict[str, float]]
"""By operator or part, `ms` and `calls` of one step."""


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Return the options, and those of training.py, which all its defaults stand for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", help="asset, folder or name")
    parser.add_argument("--variants", nargs="+", default=["floor", "lora", "furina"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=25, help="operators of the table")
    parser.add_argument("--results", type=Path, help="folder for profile.json and profile.md")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.rows < 1:
        parser.error("--rounds and --rows must be at least 1")
    backbone = ["--backbone", options.backbone] if options.backbone else []
    return options, training_options(backbone)


def measure(options: argparse.Namespace, step: argparse.Namespace, command: str) -> dict[str, Any]:
    """Profile every variant; return the report."""
    names = select(options.variants)
    model, batch = prepare(step)
    variants = {name: make(name, model, batch, step) for name in names}
    operators: dict[str, list[Profile]] = defaultdict(list)
    parts: dict[str, list[Profile]] = defaultdict(list)
    for variant in variants.values():
        variant.seconds()
    for number in range(1, options.rounds + 1):
        for name, variant in variants.items():
            with profile(activities=[ProfilerActivity.CPU]) as found:
                variant.seconds()
            events = found.key_averages()
            operators[name].append(
                {e.key: {"ms": e.self_cpu_time_total / 1e3, "calls": e.count} for e in events}
            )
            parts[name].append(
                {
                    e.key: {"ms": e.cpu_time_total / 1e3, "calls": e.count}
                    for e in events
                    if e.key in PARTS
                }
            )
        print(f"round {number} of {options.rounds}", flush=True)
    hidden = ("moe_peft", "results", "one")
    return {
        "command": command,
        "settings": {
            "step": {key: value for key, value in vars(step).items() if key not in hidden},
            "rounds": options.rounds,
            "rows": options.rows,
        },
        "environment": asdict(provenance()),
        "operators": {name: medians(rounds) for name, rounds in operators.items()},
        "parts": {name: medians(rounds) for name, rounds in parts.items()},
    }


def medians(rounds: Sequence[Profile]) -> Profile:
    """Return the median over rounds; what a round lacks took no time in it."""
    nothing = {"ms": 0.0, "calls": 0}
    keys = sorted({key for each in rounds for key in each})
    return {
        key: {
            item: statistics.median(each.get(key, nothing)[item] for each in rounds)
            for item in nothing
        }
        for key in keys
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Return three tables: the step, its parts, and the operators that take the most time."""
    parts, operators = report["parts"], report["operators"]
    most = {
        key: max(each.get(key, {"ms": 0})["ms"] for each in operators.values())
        for each in operators.values()
        for key in each
    }
    largest = sorted(most, key=most.__getitem__, reverse=True)[: report["settings"]["rows"]]
    known = [key for key in PARTS if any(key in each for each in parts.values())]
    environment = report["environment"]
    hardware = environment["hardware"]
    remark = (
        f"Milliseconds and calls of one step under the profiler, medians over rounds: "
        f"{report['settings']['rounds']}. {hardware['accelerator'] or hardware['cpu']}, threads: "
        f"{report['settings']['step']['threads']}; torch {environment['packages']['torch']}; "
        f"commit {(environment['commit'] or 'unknown')[:10]}. Made by {report['command']}."
    )
    tables = [
        build("whole", "A step", _whole_steps(report), (remark,)),
        _table("Parts of a step, with all that they call", parts, known, PARTS, remark),
        _table("Operators, without what they call", operators, largest, {}, remark),
    ]
    return "\n".join(f"## {table.title}\n\n{render(table)}" for table in tables)


def _whole_steps(report: Mapping[str, Any]) -> list[Row]:
    """Return for each variant what its step takes, and what of it no other writing would save."""
    rows: list[Row] = []
    for name, operators in report["operators"].items():
        parts = report["parts"][name]
        whole = sum(each["ms"] for each in operators.values())
        products = sum(operators[key]["ms"] for key in PRODUCTS if key in operators)
        own = sum(parts[key]["ms"] for key in OWN if key in parts)
        calls = sum(each["calls"] for each in operators.values())
        row: Row = {("", "variant"): label(name)}
        row["", "ms"] = Cell(f"{whole:.0f}", {"": whole})
        row["", "matrix products, ms"] = Cell(f"{products:.0f}", {"": products})
        row["", "norms, B̃, M and activity, ms"] = Cell(f"{own:.0f}", {"": own})
        row["", "calls"] = Cell(f"{calls:.0f}", {"": calls})
        rows.append(row)
    return rows


def _table(
    title: str,
    profiles: Mapping[str, Profile],
    keys: Sequence[str],
    words: Mapping[str, str],
    remark: str,
) -> Table:
    rows: list[Row] = []
    for key in keys:
        row: Row = {("", "what"): label(f"{key}: {words[key]}" if key in words else key)}
        for name, found in profiles.items():
            row[name, "ms"] = _number(found.get(key), "ms", "{:.1f}")
            row[name, "calls"] = _number(found.get(key), "calls", "{:.0f}")
        rows.append(row)
    return build("profile", title, rows, (remark,))


def _number(found: Mapping[str, float] | None, item: str, form: str) -> Cell:
    return missing() if found is None else Cell(form.format(found[item]), {"": found[item]})


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, step = parse(arguments)
    try:
        command = command_line("step_profile.py", arguments)
        report = measure(options, step, command)
        if options.results:
            write_json(options.results / "profile.json", report)
            write_text(options.results / "profile.md", markdown(report))
    except FurinaError as error:
        sys.exit(f"error: {error}")
    print(markdown(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
