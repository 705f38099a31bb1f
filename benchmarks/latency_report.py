"""What latency.py reports: paired ratios with intervals, and the tables and figure of its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from intervals import median_interval
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from furina.reporting.figures import plots
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text

Report = Mapping[str, Any]
Rounds = Mapping[str, Sequence[Mapping[str, float]]]
"""Milliseconds of each variant's generations, round by round, by the name of the time."""
PAIRS = {
    "merged/base": ("disk_merged", "disk_base"),
    "furina_unmerged/furina_literal": ("furina_unmerged", "furina_literal"),
    "furina_unmerged/peft_lora_unmerged": ("furina_unmerged", "peft_lora_unmerged"),
    "furina_unmerged/peft_lora_bf16_unmerged": ("furina_unmerged", "peft_lora_bf16_unmerged"),
    "furina_merged/peft_lora_merged": ("furina_merged", "peft_lora_merged"),
    "lora_unmerged/peft_lora_unmerged": ("lora_unmerged", "peft_lora_unmerged"),
    "dora_unmerged/peft_dora_unmerged": ("dora_unmerged", "peft_dora_unmerged"),
    "moe_peft_mixlora/moe_peft_lora": ("moe_peft_mixlora", "moe_peft_lora"),
    "moe_peft_mola/moe_peft_lora": ("moe_peft_mola", "moe_peft_lora"),
    "compiled_lora_unmerged/compiled_base": ("compiled_lora_unmerged", "compiled_base"),
    "compiled_furina_merged/compiled_base": ("compiled_furina_merged", "compiled_base"),
    "compiled_furina_unmerged/compiled_base": ("compiled_furina_unmerged", "compiled_base"),
}
"""Ratios beside every variant's own to the base."""
TIMES = {
    "ttft_ms": "time to first token, ms",
    "per_token_ms": "time per token, ms",
    "total_ms": "total, ms",
}
OWNERS = {"furina": plots.COLOURS[0], "peft": plots.COLOURS[1], "moe_peft": plots.COLOURS[2]}


def cell(shape: tuple[int, int], new_tokens: int, rounds: Rounds) -> dict[str, Any]:
    """Return what one combination of batch size and prompt length showed."""
    batch, prompt = shape
    found = {
        name: {time: spread([each[time] for each in own]) for time in TIMES}
        for name, own in rounds.items()
    }
    paired = dict(pairs(rounds))
    return {
        "batch": batch,
        "prompt_tokens": prompt,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "times": found,
        "tokens_per_second": {
            name: 1e3 * batch * new_tokens / times["total_ms"]["median"]
            for name, times in found.items()
        },
        "ratios": {key: statistics.median(values) for key, values in paired.items()},
        "intervals": {key: median_interval(values) for key, values in paired.items()},
    }


def pairs(rounds: Rounds) -> Iterator[tuple[str, list[float]]]:
    """Yield each ratio's name and, round by round, its quotient of times per token."""
    wanted = dict(PAIRS)
    for name in rounds:
        if not name.startswith(("disk_", "compiled_", "base")):
            wanted[f"{name}/base"] = (name, "base")
    for key, (one, other) in wanted.items():
        if one in rounds and other in rounds:
            both = zip(rounds[one], rounds[other], strict=True)
            yield key, [a["per_token_ms"] / b["per_token_ms"] for a, b in both]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles; a single value is all three."""
    more = [*values, *values][: max(len(values), 2)]
    q1, median, q3 = statistics.quantiles(more, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def markdown(report: Report) -> str:
    """Return a table for each combination, of the variants and of the ratios."""
    tables = [_times(report, each) for each in report["cells"]]
    tables += [_ratios(each) for each in report["cells"] if each["ratios"]]
    return "\n".join(f"## {table.title}\n\n{render(table)}" for table in tables)


def _title(each: Report) -> str:
    return f"batch {each['batch']}, {each['prompt_tokens']} tokens in and {each['new_tokens']} out"


def _times(report: Report, each: Report) -> Table:
    rows = [_row(each, name) for name in each["times"]]
    rows += [_failed(name, reason) for name, reason in report["failed"].items()]
    return build("latency", f"Latency: {_title(each)}", rows, _remarks(report))


def _row(each: Report, name: str) -> Row:
    row: Row = {("", "variant"): label(name)}
    for time, words in TIMES.items():
        found = each["times"][name][time]
        row[words, "median"] = _number(found["median"], "{:.1f}")
        row[words, "quartiles"] = label(f"{found['q1']:.1f} to {found['q3']:.1f}")
    row["", "tokens/s"] = _number(each["tokens_per_second"][name], "{:.1f}")
    key = f"{name}/base"
    row["time per token over that of", "base"] = _number(each["ratios"].get(key), "{:.2f}")
    row["", "n"] = _number(each["times"][name]["total_ms"]["n"], "{:.0f}")
    return row


def _failed(name: str, reason: str) -> Row:
    row: Row = {("", "variant"): label(name, f"{name}: {reason}")}
    for words in TIMES.values():
        row[words, "median"] = row[words, "quartiles"] = missing()
    for group, column in (("", "tokens/s"), ("time per token over that of", "base"), ("", "n")):
        row[group, column] = missing()
    return row


def _number(value: float | None, form: str) -> Cell:
    return missing() if value is None else Cell(form.format(value), {"": value})


def _ratios(each: Report) -> Table:
    rows: list[Row] = []
    for key, value in each["ratios"].items():
        low, high = each["intervals"][key]
        rows.append(
            {
                ("", "ratio"): label(key),
                ("", "value"): _number(value, "{:.3f}"),
                ("", "95 % interval"): label(f"{low:.3f} to {high:.3f}"),
            }
        )
    remark = (
        "Time per token of the first over that of the second: the median of the rounds' own "
        "ratios, and a bootstrap interval of it over rounds."
    )
    return build("ratios", f"Ratios: {_title(each)}", rows, (remark,))


def _remarks(report: Report) -> tuple[str, ...]:
    settings, environment = report["settings"], report["environment"]
    hardware, packages = environment["hardware"], environment["packages"]
    names = ("torch", "transformers", "peft", "moe_peft")
    found = ", ".join(f"{name} {packages[name]}" for name in names if name in packages)
    commit = (environment["commit"] or "unknown")[:10]
    changed = " with uncommitted changes" if environment["dirty"] else ""
    return (
        f"{settings['backbone']} in {settings['dtype']}, adapters of total rank "
        f"{settings['rank']}, {settings['experts']} experts; rounds in random order, each with a "
        "new prompt that all variants read.",
        "moe_peft's variants run in its own engine: what they cost is to be compared with "
        "moe_peft_lora, not with base.",
        f"Made by {report['command']}.",
        f"{hardware['accelerator'] or hardware['cpu']}, cores: {hardware['cores']}, "
        f"threads: {settings['threads']}; {found}; commit {commit}{changed}.",
    )


def owner(name: str) -> str:
    """Return whose implementation a variant is."""
    return next((package for package in ("moe_peft", "peft") if name.startswith(package)), "furina")


def figure(report: Report) -> Figure:
    """Return total time and time to first token of the first combination, a bar for each variant.

    Merged models and the base have full bars, unmerged ones hatched.
    """
    first = report["cells"][0]
    names = [name for name in first["times"] if not name.startswith("disk_")]
    with plots.style():
        drawn = Figure(figsize=(8.6, 1.0 + 0.22 * len(names)), layout="constrained")
        panels = drawn.subplots(1, 2, sharey=True)
        for axes, time in zip(panels, ("ttft_ms", "total_ms"), strict=True):
            spreads = [first["times"][name][time] for name in names]
            medians = [each["median"] for each in spreads]
            errors = [
                [each["median"] - each["q1"] for each in spreads],
                [each["q3"] - each["median"] for each in spreads],
            ]
            bars = axes.barh(
                names,
                medians,
                xerr=errors,
                color=[OWNERS[owner(name)] for name in names],
                error_kw={"elinewidth": 0.9, "capsize": 2},
            )
            for name, bar in zip(names, bars, strict=True):
                if name != "base" and not name.endswith("_merged"):
                    bar.set(hatch="////", edgecolor="white", linewidth=0)
            axes.axvline(first["times"]["base"][time]["median"], color="black", linewidth=0.8)
            axes.set_xlabel(TIMES[time])
            axes.grid(axis="y", visible=False)
        panels[0].invert_yaxis()
        panels[0].margins(y=0.01)
        handles = [
            Patch(color=OWNERS[name], label=name) for name in dict.fromkeys(map(owner, names))
        ]
        handles.append(
            Patch(facecolor="#999999", hatch="////", edgecolor="white", label="unmerged")
        )
        drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        drawn.suptitle(_title(first), fontsize=10)
    return drawn


def write(report: Report, folder: Path) -> None:
    """Write latency.json, and latency.md and latency.svg made from it."""
    write_json(folder / "latency.json", report)
    write_text(folder / "latency.md", markdown(report))
    if "base" in report["cells"][0]["times"]:
        write_text(folder / "latency.svg", plots.svg(figure(report)))
