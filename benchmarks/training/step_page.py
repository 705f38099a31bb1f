"""What step.py reports: paired ratios, and the tables and the figure made from its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from matplotlib.figure import Figure

from benchmarks.common import show
from benchmarks.common.rounds import quotients
from furina.adapters import methods
from furina.reporting.figures import plots

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
    found = [
        quotient
        for rounds in groups
        if one in rounds and other in rounds
        for quotient in quotients(rounds[one], rounds[other])
    ]
    return median(found) if found else None


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


def page(report: show.Report) -> show.Page:
    """Return the report's tables: a row for each variant, and the named ratios."""
    settings, seconds, memory = report["settings"], report["seconds"], report["memory_bytes"]
    failed = (name.removeprefix("memory/") for name in report["failed"])
    tokens = settings["rows"] * settings["tokens"]
    rows = [
        {
            "variant": name,
            "trainable": report["trainable"].get(name),
            "seconds": seconds.get(name),
            "speed": tokens / seconds[name]["median"] if name in seconds else None,
            "to": {other: values.get(name) for other, values in report["ratios_to"].items()},
            "memory": memory.get(name),
        }
        for name in dict.fromkeys([*seconds, *memory, *failed])
    ]
    columns: show.Columns = {
        ("", "variant"): lambda row: show.noted(report, row["variant"], f"memory/{row['variant']}"),
        ("", "trainable, M"): show.at("trainable .2f", 1e-6),
        ("seconds", "median"): "seconds.median .3f",
        ("seconds", "quartiles"): show.between("seconds", ".3f"),
        ("", "tokens/s"): "speed .0f",
        **{("time over that of", other): f"to.{other} .2f" for other in report["ratios_to"]},
    }
    if memory:
        columns["", "peak memory, MiB"] = show.at("memory .0f", 2**-20)
    steps = show.table("step", "One optimiser step", rows, columns, *_remarks(report))
    remark = "The first one's time, or memory, over the second one's: below 1 it needs less."
    ratios = show.ratios(report, ".2f", "Ratios", remark)
    return show.Page([steps, *ratios], figure=_figure(report))


def _remarks(report: show.Report) -> tuple[str, ...]:
    settings = report["settings"]
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
        f"{show.machine(report)}; "
        f"{show.versions(report, 'torch', 'transformers', 'peft', 'moe_peft')}; "
        f"{show.commit(report)}.",
    )


def _figure(report: show.Report) -> Figure | None:
    """Return the seconds of a step, a bar for each variant; None where none was timed."""
    seconds = report["seconds"]
    if not seconds:
        return None
    with plots.style():
        drawn = Figure(figsize=(7.6, 0.8 + 0.24 * len(seconds)), layout="constrained")
        axes = drawn.add_subplot()
        show.bars(axes, seconds)
        axes.invert_yaxis()
        axes.set_xlabel("seconds per optimiser step: median and quartiles")
        axes.legend(handles=show.owners_legend(seconds), loc="best")
    return drawn
