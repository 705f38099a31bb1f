"""What vllm_engine.py reports: paired ratios with intervals, and the tables made from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intervals import median_interval
from latency_report import TIMES, spread

from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text

Report = Mapping[str, Any]
Rounds = Mapping[str, Sequence[Mapping[str, float]]]
"""Milliseconds of each variant's generations, round by round, by the name of the time."""
RATIOS = ("merged/base", "adapter/base", "base_again/base")
NO_QUARTILES = "–"


def summary(rounds: Rounds, new_tokens: int) -> dict[str, Any]:
    """Return the rounds and what they come to: times, tokens per second, ratios, intervals.

    A ratio's name ends in that of its time, or, for the total, in nothing.
    """
    timed = {name: own for name, own in rounds.items() if own}
    times = {
        name: {time: spread([each[time] for each in own]) for time in TIMES}
        for name, own in timed.items()
    }
    quotients = paired(timed)
    return {
        "rounds": timed,
        "times": times,
        "tokens_per_second": {
            name: 1e3 * new_tokens / own["total_ms"]["median"] for name, own in times.items()
        },
        "ratios": {key: statistics.median(values) for key, values in quotients.items()},
        "intervals": {key: median_interval(values) for key, values in quotients.items()},
    }


def paired(rounds: Rounds) -> dict[str, list[float]]:
    """Return, for each ratio whose two variants were timed, its quotient round by round."""
    found: dict[str, list[float]] = {}
    for time in ("total_ms", "ttft_ms", "per_token_ms"):
        for pair in RATIOS:
            one, other = pair.split("/")
            if one in rounds and other in rounds:
                key = pair if time == "total_ms" else f"{pair}/{time}"
                both = zip(rounds[one], rounds[other], strict=True)
                found[key] = [a[time] / b[time] for a, b in both]
    return found


def markdown(report: Report) -> str:
    """Return the report's tables: times, ratios, likeliest tokens, exceptions, generations."""
    tables = [_times(report)]
    tables += [_ratios(report)] if report["ratios"] else []
    tables += [_verdicts(report)] if report["verdicts"] else []
    tables += [_exceptions(report)] if any(_listed(report)) else []
    tables += [_agreements(report)] if report["agreements"] else []
    return "\n".join(f"## {table.title}\n\n{render(table)}" for table in tables)


def _times(report: Report) -> Table:
    names = dict.fromkeys([*report["load_seconds"], *report["failed"]])
    rows = [_row(report, name) for name in names]
    return build("engine", _title(report["settings"]), rows, _remarks(report))


def _title(settings: Report) -> str:
    tokens = f"{settings['prompt_tokens']} tokens in and {settings['new_tokens']} out"
    return f"vLLM: batch 1, {tokens}"


def _row(report: Report, name: str) -> Row:
    times, reason = report["times"].get(name), report["failed"].get(name)
    row: Row = {("", "engine"): label(name, *([f"{name}: {reason}"] if reason else []))}
    row["", "loading, s"] = _number(report["load_seconds"].get(name), "{:.1f}")
    for time, words in TIMES.items():
        row[words, "median"] = _number(times and times[time]["median"], "{:.1f}")
        quartiles = times and f"{times[time]['q1']:.1f} to {times[time]['q3']:.1f}"
        row[words, "quartiles"] = label(quartiles or NO_QUARTILES)
    row["", "tokens/s"] = _number(report["tokens_per_second"].get(name), "{:.1f}")
    row["", "n"] = _number(times and times["total_ms"]["n"], "{:.0f}")
    return row


def _number(value: float | None, form: str) -> Cell:
    return missing() if value is None else Cell(form.format(value), {"": value})


def _ratios(report: Report) -> Table:
    rows: list[Row] = []
    for key, value in report["ratios"].items():
        one, other, *time = key.split("/")
        low, high = report["intervals"][key]
        rows.append(
            {
                ("", "ratio"): label(f"{one}/{other}"),
                ("", "of the"): label(TIMES[time[0] if time else "total_ms"].partition(",")[0]),
                ("", "value"): _number(value, "{:.3f}"),
                ("", "95 % interval"): label(f"{low:.3f} to {high:.3f}"),
            }
        )
    remark = (
        "The median of the rounds' own ratios, and a bootstrap interval of it over rounds; below 1 "
        "the first is quicker. base_again is the base in another process: its ratio is noise."
    )
    return build("ratios", "Ratios", rows, (remark,))


def _verdicts(report: Report) -> Table:
    rows = [_verdict(name, found) for name, found in report["verdicts"].items()]
    settings, moved = report["settings"], report["update"]["changed"]
    remarks = [
        f"{settings['rows']} rows of {settings['row_tokens']} tokens: {settings['prompts']}. "
        "Lead: our exact first logit minus the second. Rounding: the largest change of the first's "
        f"lead over any of the ten likeliest tokens, from {_exact(settings)} to "
        f"{settings['dtype']} in our own model at any position. Where the lead is larger, vLLM's "
        "likeliest token must be ours.",
        "Log-probability error: of the real next token, against our exact one.",
    ]
    if moved:
        remarks.append(
            f"The update changes the likeliest token at {moved['positions']} positions, "
            f"{moved['decided']} of them with a lead above rounding."
        )
    return build("verdicts", "The likeliest next token, vLLM's and ours", rows, tuple(remarks))


def _exact(settings: Report) -> str:
    return "float64" if settings["dtype"] == "float32" else "float32"


def _verdict(name: str, found: Report) -> Row:
    theirs, ours = found["logprob_error"], found["logprob_error_rounded"]
    return {
        ("", "engine"): label(name),
        ("", "positions"): _number(found["positions"], "{:.0f}"),
        ("", "rounding"): _number(found["allowed"], "{:.3g}"),
        ("lead above rounding", "positions"): _number(found["decided"], "{:.0f}"),
        ("lead above rounding", "other token"): _number(found["exceptions"], "{:.0f}"),
        ("other token anywhere", "vLLM"): _number(found["disagree"], "{:.0f}"),
        ("other token anywhere", "ours rounded"): _number(found["disagree_rounded"], "{:.0f}"),
        ("other token anywhere", "largest lead"): _number(found["largest_gap"], "{:.3g}"),
        ("log-probability error, median", "vLLM"): _number(theirs["median"], "{:.2g}"),
        ("log-probability error, median", "ours rounded"): _number(ours["median"], "{:.2g}"),
        ("log-probability error, largest", "vLLM"): _number(theirs["max"], "{:.2g}"),
        ("log-probability error, largest", "ours rounded"): _number(ours["max"], "{:.2g}"),
    }


def _listed(report: Report) -> list[tuple[str, Report]]:
    return [
        (name, each)
        for name, found in report["verdicts"].items()
        for each in found["disagreements"]
        if each["gap"] > found["allowed"]
    ]


def _exceptions(report: Report) -> Table:
    rows: list[Row] = [
        {
            ("", "engine"): label(name),
            **{("", key): _number(each[key], "{:.0f}") for key in ("row", "position")},
            ("", "lead"): _number(each["gap"], "{:.3g}"),
            ("token", "ours"): _number(each["ours"], "{:.0f}"),
            ("token", "ours rounded"): _number(each["ours_rounded"], "{:.0f}"),
            ("token", "vLLM's"): _number(each["theirs"], "{:.0f}"),
        }
        for name, each in _listed(report)
    ]
    return build("exceptions", "Exceptions", rows)


def _agreements(report: Report) -> Table:
    rows: list[Row] = [
        {
            ("", "generations of"): label(pair),
            ("", "prompts"): _number(found["n"], "{:.0f}"),
            ("", "all tokens equal, %"): _number(100 * found["equal"], "{:.0f}"),
            ("", "equal from the start, tokens"): _number(found["prefix"], "{:.1f}"),
        }
        for pair, found in report["agreements"].items()
    ]
    remark = (
        f"Greedy, {report['settings']['new_tokens']} tokens, all prompts in one batch; ours/ is "
        "transformers' generation, of the model with the adapter beside it or merged. A tie that "
        "rounding decides changes all that follows."
    )
    return build("agreements", "Greedy generations", rows, (remark,))


def _remarks(report: Report) -> tuple[str, ...]:
    settings, environment, update = report["settings"], report["environment"], report["update"]
    hardware, packages = environment["hardware"], environment["packages"]
    names = ("torch", "transformers", "vllm", "torch (vllm)", "transformers (vllm)")
    found = ", ".join(f"{name} {packages[name]}" for name in names if name in packages)
    commit = (environment["commit"] or "unknown")[:10]
    changed = " with uncommitted changes" if environment["dirty"] else ""
    made = "every parameter moved by a seed" if settings["adapter"] is None else "a trained one"
    return (
        f"{settings['backbone']} in {settings['dtype']}, an adapter of rank {update['rank']} with "
        f"|ΔW|/|W| = {update['relative']:.3f}, {made}; rounds in random order, each with a new "
        "random prompt that all engines read.",
        "Each engine is a process of its own, eager, without prefix caching; the adapter runs as "
        "vLLM's LoRA. Loading is one measurement each, imports not included.",
        f"Made by {report['command']}.",
        f"{hardware['accelerator'] or hardware['cpu']}, cores: {hardware['cores']}, "
        f"an engine's threads: {settings['threads']}; {found}; commit {commit}{changed}.",
    )


def write(report: Report, folder: Path) -> None:
    """Write engine.json, and engine.md made from it."""
    write_json(folder / "engine.json", report)
    write_text(folder / "engine.md", markdown(report))
