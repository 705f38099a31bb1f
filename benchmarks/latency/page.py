"""What decoding.py reports: paired ratios with intervals, and the tables and figure of its JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.common import show
from benchmarks.common.rounds import median_interval, quotients, spread
from furina.reporting.figures import plots
from furina.reporting.tables.cells import Cell, Table, missing

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


def cell(shape: tuple[int, int], new_tokens: int, rounds: Rounds) -> dict[str, Any]:
    """Return what one combination of batch size and prompt length showed."""
    batch, prompt = shape
    sized = {"batch": batch, "prompt_tokens": prompt, "new_tokens": new_tokens}
    return {**sized, **summary(rounds, batch * new_tokens, dict(pairs(rounds)))}


def summary(rounds: Rounds, tokens: int, paired: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the rounds and what they come to; `tokens` are new in each, `paired` by a ratio."""
    times = {
        name: {time: spread([each[time] for each in own]) for time in TIMES}
        for name, own in rounds.items()
    }
    return {
        "rounds": rounds,
        "times": times,
        "tokens_per_second": {
            name: 1e3 * tokens / own["total_ms"]["median"] for name, own in times.items()
        },
        "ratios": {key: median(values) for key, values in paired.items()},
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
            yield key, paired(rounds, one, other, "per_token_ms")


def paired(rounds: Rounds, one: str, other: str, time: str) -> list[float]:
    """Return one's time over the other's, round by round."""
    both = ([each[time] for each in rounds[name]] for name in (one, other))
    return quotients(*both)


def page(report: show.Report) -> show.Page:
    """Return a table for each combination, of the variants and of the ratios."""
    remark = (
        "Time per token of the first over that of the second: the median of the rounds' own "
        "ratios, and a bootstrap interval of it over rounds."
    )
    cells = report["cells"]
    tables = [_times(report, each) for each in cells]
    for each in cells:
        tables += show.ratios(each, ".3f", f"Ratios: {_title(each)}", remark)
    return show.Page(tables, figure=_figure(cells[0]))


def _title(each: show.Report) -> str:
    return f"batch {each['batch']}, {each['prompt_tokens']} tokens in and {each['new_tokens']} out"


def _times(report: show.Report, each: show.Report) -> Table:
    rows = [
        time_row(each, name) | {"ratio": each["ratios"].get(f"{name}/base")}
        for name in (*each["times"], *report["failed"])
    ]
    columns: show.Columns = {
        ("", "variant"): lambda row: show.noted(report, row["name"]),
        **time_columns(missing()),
        ("time per token over that of", "base"): "ratio .2f",
        ("", "n"): "total_ms.n .0f",
    }
    return show.table("latency", f"Latency: {_title(each)}", rows, columns, *_remarks(report))


def time_row(found: show.Report, name: str) -> dict[str, Any]:
    """Return a variant's times, none if it was not timed."""
    speed = found["tokens_per_second"].get(name)
    return {"name": name, "speed": speed, **found["times"].get(name, {})}


def time_columns(without: Cell) -> show.Columns:
    """Return the columns of times; `without` stands for quartiles of no time."""
    columns: show.Columns = {}
    for time, words in TIMES.items():
        columns[words, "median"] = f"{time}.median .1f"
        columns[words, "quartiles"] = show.between(time, ".1f", without)
    return columns | {("", "tokens/s"): "speed .1f"}


def _remarks(report: show.Report) -> tuple[str, ...]:
    settings = report["settings"]
    return (
        f"{settings['backbone']} in {settings['dtype']}, adapters of total rank "
        f"{settings['rank']}, {settings['experts']} experts; rounds in random order, each with a "
        "new prompt that all variants read.",
        "moe_peft's variants run in its own engine: what they cost is to be compared with "
        "moe_peft_lora, not with base.",
        f"Made by {report['command']}.",
        f"{show.machine(report)}; "
        f"{show.versions(report, 'torch', 'transformers', 'peft', 'moe_peft')}; "
        f"{show.commit(report)}.",
    )


def _figure(first: show.Report) -> Figure | None:
    """Return total time and time to first token of one combination, a bar for each variant.

    Merged models and the base have full bars, unmerged ones hatched. None where no base was timed.
    """
    if "base" not in first["times"]:
        return None
    names = [name for name in first["times"] if not name.startswith("disk_")]
    with plots.style():
        drawn = Figure(figsize=(8.6, 1.0 + 0.22 * len(names)), layout="constrained")
        panels = drawn.subplots(1, 2, sharey=True)
        for axes, time in zip(panels, ("ttft_ms", "total_ms"), strict=True):
            drawn_bars = show.bars(axes, {name: first["times"][name][time] for name in names})
            for name, bar in zip(names, drawn_bars, strict=True):
                if name != "base" and not name.endswith("_merged"):
                    bar.set(hatch="////", edgecolor="white", linewidth=0)
            axes.axvline(first["times"]["base"][time]["median"], color="black", linewidth=0.8)
            axes.set_xlabel(TIMES[time])
        panels[0].invert_yaxis()
        handles = show.owners_legend(names)
        unmerged = Patch(facecolor="#999999", hatch="////", edgecolor="white", label="unmerged")
        handles.append(unmerged)
        drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        drawn.suptitle(_title(first), fontsize=10)
    return drawn
