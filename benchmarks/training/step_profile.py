"""Say where the time of an optimiser step goes, operator by operator; the last line is JSON.

    python -m benchmarks.training.step_profile --results results/training
    python -m benchmarks.training.step_profile --variants lora dora --rounds 3

The variants are those of step.py, stepped in rounds under torch's profiler. Milliseconds are of
one step: an operator's own time without what it calls, the median over rounds. A part is a function
with all that it calls. Profiling adds about a microsecond to every call.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

from torch.profiler import ProfilerActivity, profile

from benchmarks.common import show
from benchmarks.common.command import NOT_SETTINGS, Parser, Report, described, run, select
from benchmarks.training.step import make, prepare, variant_names
from benchmarks.training.step import parse as step_options
from furina.reporting.tables.cells import Table

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
WHOLE = ("ms", "matrix products, ms", "norms, B̃, M and activity, ms", "calls")
Profile = dict[str, dict[str, float]]
"""By operator or part, `ms` and `calls` of one step."""


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone rounds results")
    made.add_argument("--variants", nargs="+", default=["floor", "lora", "furina"])
    made.add_argument("--rows", type=int, default=25, help="operators of the table")
    return made.checked(arguments, "rounds rows")


def measure(options: Namespace, command: str) -> Report:
    """Profile every variant; return the report."""
    names = select(variant_names(), options.variants)
    step = step_options(["--backbone", options.backbone])  # all its defaults
    model, batch = prepare(step)
    variants = {name: make(name, model, batch, step) for name in names}
    operators: dict[str, list[Profile]] = {name: [] for name in names}
    parts: dict[str, list[Profile]] = {name: [] for name in names}
    for variant in variants.values():
        variant.step()
    for number in range(1, options.rounds + 1):
        for name, variant in variants.items():
            with profile(activities=[ProfilerActivity.CPU]) as found:
                variant.step()
            events = found.key_averages()
            own = {e.key: {"ms": e.self_cpu_time_total / 1e3, "calls": e.count} for e in events}
            whole = {e.key: {"ms": e.cpu_time_total / 1e3, "calls": e.count} for e in events}
            operators[name].append(own)
            parts[name].append({key: whole[key] for key in whole if key in PARTS})
        print(f"round {number} of {options.rounds}", flush=True)
    settings = {key: value for key, value in vars(step).items() if key not in NOT_SETTINGS}
    return {
        **described(options, command),
        "settings": {"step": settings, "rounds": options.rounds, "rows": options.rows},
        "operators": {name: medians(rounds) for name, rounds in operators.items()},
        "parts": {name: medians(rounds) for name, rounds in parts.items()},
    }


def medians(rounds: Sequence[Profile]) -> Profile:
    """Return the median over rounds; what a round lacks took no time in it."""
    nothing = {"ms": 0.0, "calls": 0}
    keys = sorted({key for each in rounds for key in each})
    return {
        key: {item: median(each.get(key, nothing)[item] for each in rounds) for item in nothing}
        for key in keys
    }


def page(report: show.Report) -> show.Page:
    """Return three tables: the step, its parts, and the operators that take the most time."""
    parts, operators, settings = report["parts"], report["operators"], report["settings"]
    most = {
        key: max(each.get(key, {"ms": 0})["ms"] for each in operators.values())
        for each in operators.values()
        for key in each
    }
    largest = sorted(most, key=most.__getitem__, reverse=True)[: settings["rows"]]
    known = [key for key in PARTS if any(key in each for each in parts.values())]
    remark = (
        f"Milliseconds and calls of one step under the profiler, medians over rounds: "
        f"{settings['rounds']}. {show.processor(report)}, threads: {settings['step']['threads']}; "
        f"{show.versions(report, 'torch')}; {show.commit(report)}. Made by {report['command']}."
    )
    wholes = [{"variant": name, **whole_step(report, name)} for name in operators]
    shown = {("", "variant"): "variant", **{("", what): f"{what} .0f" for what in WHOLE}}
    return show.Page(
        [
            show.table("whole", "A step", wholes, shown, remark),
            _table("Parts of a step, with all that they call", parts, known, PARTS, remark),
            _table("Operators, without what they call", operators, largest, {}, remark),
        ]
    )


def whole_step(report: show.Report, name: str) -> dict[str, float]:
    """Return what a variant's step takes, and what of it no other writing would save."""
    operators, parts = report["operators"][name], report["parts"][name]
    found = (
        sum(each["ms"] for each in operators.values()),
        sum(operators[key]["ms"] for key in PRODUCTS if key in operators),
        sum(parts[key]["ms"] for key in OWN if key in parts),
        sum(each["calls"] for each in operators.values()),
    )
    return dict(zip(WHOLE, found, strict=True))


def _table(
    title: str,
    profiles: Mapping[str, Profile],
    keys: Sequence[str],
    words: Mapping[str, str],
    remark: str,
) -> Table:
    items = [
        {
            "what": f"{key}: {words[key]}" if key in words else key,
            **{name: found.get(key) for name, found in profiles.items()},
        }
        for key in keys
    ]
    columns = {("", "what"): "what"}
    for name in profiles:
        columns |= {(name, "ms"): f"{name}.ms .1f", (name, "calls"): f"{name}.calls .0f"}
    return show.table("profile", title, items, columns, remark)


main = partial(run, "training.step_profile", parse, measure, "profile", page)

if __name__ == "__main__":
    main()
