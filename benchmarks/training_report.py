"""What training.py reports: paired ratios, and the table and the figure made from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from furina.adapters import methods
from furina.reporting.figures import plots
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text

Report = Mapping[str, Any]
Rounds = dict[str, list[float]]
"""Seconds of each variant's steps, round by round."""
SHIPPED = {
    "furina": (
        *("peft_lora", "peft_lora_bf16", "peft_dora", "peft_dora_bf16"),
        *("moe_peft_lora", "moe_peft_mixlora", "moe_peft_mola", "moe_peft_loramoe"),
    ),
    "lora": ("peft_lora", "peft_lora_bf16", "moe_peft_lora"),
    "dora": ("peft_dora", "peft_dora_bf16"),
    "mixlora": ("moe_peft_mixlora",),
    "mola": ("moe_peft_mola",),
    "loramoe": ("moe_peft_loramoe",),
}
"""Which peers a method of ours is held against, each in its own loop."""
SAME = {
    "furina": ("floor", "peft_lora", "peft_lora_bf16"),
    "lora": ("floor", "peft_lora", "peft_lora_bf16"),
    "dora": ("peft_dora", "peft_dora_bf16"),
}
"""What a method of ours is held against in one loop, beside our LoRA."""
OWNERS = {"furina": plots.COLOURS[0], "peft": plots.COLOURS[1], "moe_peft": plots.COLOURS[2]}


def pairs() -> Iterator[tuple[str, str, str]]:
    """Yield each ratio's key and the two variants whose quotient it is."""
    for name in ("furina", "furina_no_loss", *methods()):
        if name != "lora":
            yield f"same_loop/{name}/lora", name, "lora"
    for ours, others in SAME.items():
        for other in others:
            variant = f"same_loop/{other}" if "peft" in other else other
            yield f"same_loop/{ours}/{other}", ours, variant
    for ours, others in SHIPPED.items():
        for other in others:
            for loop in ("as_shipped", "kept") if other.startswith("moe_peft") else ("as_shipped",):
                yield f"{loop}/{ours}/{other}", ours, f"{loop}/{other}"


def paired(groups: Sequence[Rounds], one: str, other: str) -> float | None:
    """Return the median of one's time over the other's in a round; None if no group has both."""
    quotients = [
        a / b
        for rounds in groups
        if one in rounds and other in rounds
        for a, b in zip(rounds[one], rounds[other], strict=True)
    ]
    return statistics.median(quotients) if quotients else None


def ratios(groups: Sequence[Rounds], memory: Mapping[str, int]) -> dict[str, float]:
    """Return every ratio whose two variants were measured; below 1 the first needs less."""
    found: dict[str, float] = {}
    wanted = {key: (one, other) for key, one, other in pairs()}
    for key, (one, other) in wanted.items():
        if (quotient := paired(groups, one, other)) is not None:
            found[key] = quotient
    for key, (one, other) in wanted.items():
        if one in memory and other in memory:
            # What is held against the peer in our loop needs no word for it.
            found[f"memory/{key.removeprefix('same_loop/')}"] = memory[one] / memory[other]
    return found


def experts_case(name: str, experts: int) -> str:
    """Return what the memory of a variant with so many experts is called."""
    return f"{name}, experts: {experts}"


def expert_ratios(memory: Mapping[str, int], experts: int) -> dict[str, float]:
    """Return the memory at each number of experts over that at `experts`, at equal total rank."""
    found: dict[str, float] = {}
    for name in ("furina", "furina_no_loss"):
        for case, size in memory.items():
            if case.startswith(f"{name}, ") and (usual := memory.get(experts_case(name, experts))):
                count = case.rpartition(" ")[2]
                found[f"memory/{name}/experts_{count}/experts_{experts}"] = size / usual
    return found


def ratios_to(groups: Sequence[Rounds], other: str) -> dict[str, float]:
    """Return every variant's ratio to `other`, none if that was not timed."""
    names = dict.fromkeys(name for rounds in groups for name in rounds)
    found = {name: paired(groups, name, other) for name in names}
    return {name: quotient for name, quotient in found.items() if quotient is not None}


def tokens_per_second(report: Report, name: str) -> float:
    settings = report["settings"]
    return settings["rows"] * settings["tokens"] / report["seconds"][name]["median"]


def text(report: Report) -> str:
    """Return a line for each variant."""
    return "".join(f"{_line(report, name)}\n" for name in report["seconds"])


def _line(report: Report, name: str) -> str:
    seconds = report["seconds"][name]
    line = (
        f"{name:<28} {seconds['median']:7.3f} s [{seconds['q1']:.3f}, {seconds['q3']:.3f}]"
        f"   {tokens_per_second(report, name):7.0f} tokens/s"
    )
    for other, values in report["ratios_to"].items():
        line += f"   {values[name]:5.2f}x {other}" if name in values else ""
    return line


def markdown(report: Report) -> str:
    """Return the report's tables: a row for each variant, and the named ratios."""
    tables = [_steps(report), *([_ratio_table(report)] if report["ratios"] else [])]
    return "\n".join(f"## {table.title}\n\n{render(table)}" for table in tables)


def _names(report: Report) -> list[str]:
    failed = (name.removeprefix("memory/") for name in report["failed"])
    return list(dict.fromkeys([*report["seconds"], *report["memory_bytes"], *failed]))


def _steps(report: Report) -> Table:
    rows = [_row(report, name) for name in _names(report)]
    return build("step", "One optimiser step", rows, _remarks(report))


def _row(report: Report, name: str) -> Row:
    failed = report["failed"]
    notes = [f"{key}: {failed[key]}" for key in (name, f"memory/{name}") if key in failed]
    row: Row = {("", "variant"): label(name, *notes)}
    row["", "trainable, M"] = _number(report["trainable"].get(name), "{:.2f}", 1e-6)
    seconds = report["seconds"].get(name, {})
    row["seconds", "median"] = _number(seconds.get("median"), "{:.3f}")
    quartiles = f"{seconds['q1']:.3f} to {seconds['q3']:.3f}" if seconds else None
    row["seconds", "quartiles"] = label(quartiles) if quartiles else missing()
    speed = tokens_per_second(report, name) if seconds else None
    row["", "tokens/s"] = _number(speed, "{:.0f}")
    for other, values in report["ratios_to"].items():
        row["time over that of", other] = _number(values.get(name), "{:.2f}")
    if report["memory_bytes"]:
        row["", "peak memory, MiB"] = _number(report["memory_bytes"].get(name), "{:.0f}", 2**-20)
    return row


def _number(value: float | None, form: str, factor: float = 1) -> Cell:
    return missing() if value is None else Cell(form.format(value * factor), {"": value})


def _ratio_table(report: Report) -> Table:
    rows: list[Row] = [
        {("", "ratio"): label(key), ("", "value"): _number(value, "{:.2f}")}
        for key, value in report["ratios"].items()
    ]
    remark = "The first one's time, or memory, over the second one's: below 1 it needs less."
    return build("ratios", "Ratios", rows, (remark,))


def _remarks(report: Report) -> tuple[str, ...]:
    settings, environment = report["settings"], report["environment"]
    hardware, packages = environment["hardware"], environment["packages"]
    versions = ("torch", "transformers", "peft", "moe_peft")
    found = ", ".join(f"{name} {packages[name]}" for name in versions if name in packages)
    commit = (environment["commit"] or "unknown")[:10]
    changed = " with uncommitted changes" if environment["dirty"] else ""
    return (
        f"{settings['rows']} rows of {settings['tokens']} tokens, {settings['backbone']} in "
        f"{settings['dtype']}, {settings['attention']} attention, total rank {settings['rank']}, "
        f"{settings['experts']} experts, dropout {settings['dropout']:g}; rounds of "
        f"random order: {settings['rounds']} in each group of variants; a ratio is the median of "
        "the rounds' own.",
        f"Made by {report['command']}.",
        "Unprefixed variants and same_loop/ run in our loop, as_shipped/ in the peer's. moe_peft's "
        "trainer recomputes activations in the backward; kept/ is its loop without that.",
        "Peak memory is what the first three steps add to model and adapter.",
        f"{hardware['accelerator'] or hardware['cpu']}, cores: {hardware['cores']}, "
        f"threads: {settings['threads']}; {found}; commit {commit}{changed}.",
    )


def owner(name: str) -> str:
    """Return whose implementation a variant is."""
    peer = name.rpartition("/")[2]
    return next((package for package in ("moe_peft", "peft") if peer.startswith(package)), "furina")


def figure(report: Report) -> Figure:
    """Return the seconds of a step, a bar for each variant with its quartiles."""
    names = list(report["seconds"])
    medians = [report["seconds"][name]["median"] for name in names]
    lower = [report["seconds"][name]["median"] - report["seconds"][name]["q1"] for name in names]
    upper = [report["seconds"][name]["q3"] - report["seconds"][name]["median"] for name in names]
    owners = [owner(name) for name in names]
    with plots.style():
        drawn = Figure(figsize=(7.6, 0.8 + 0.24 * len(names)), layout="constrained")
        axes = drawn.add_subplot()
        colours = [OWNERS[package] for package in owners]
        whiskers = {"elinewidth": 0.9, "capsize": 2}
        axes.barh(names, medians, xerr=[lower, upper], color=colours, error_kw=whiskers)
        axes.margins(y=0.01)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds per optimiser step: median and quartiles")
        handles = [Patch(color=OWNERS[package], label=package) for package in dict.fromkeys(owners)]
        axes.legend(handles=handles, loc="best")
    return drawn


def write(report: Report, folder: Path) -> None:
    """Write step.json, and step.md and step.svg made from it."""
    write_json(folder / "step.json", report)
    write_text(folder / "step.md", markdown(report))
    if report["seconds"]:
        write_text(folder / "step.svg", plots.svg(figure(report)))
