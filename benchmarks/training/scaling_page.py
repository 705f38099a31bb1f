"""What scaling.py reports: the tables and the figure made from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from benchmarks.common import show
from furina.reporting.figures import plots
from furina.reporting.tables.cells import Cell, Row, Table, build, decimals, label, missing

NAMES = {
    "frozen": "frozen",
    "lora": "LoRA",
    "furina_no_loss": "FURINA, no loss",
    "furina": "FURINA",
}
COMPARED = ("furina_no_loss", "furina")
LOOKS = {
    "frozen": ("black", "*"),
    **{name: (plots.COLOURS[i], plots.MARKERS[i]) for i, name in enumerate(COMPARED)},
}
COLUMNS = 3
TERA, GIGA, MIB, MILLI = 1e12, 1e9, 2**20, 1e-3


def page(report: show.Report) -> show.Page:
    """Return a table for each series and one for the backbones, with a sentence for each."""
    settings, backbones = report["settings"], report["backbones"]
    tables = [
        build("scaling", name[0].upper() + name[1:], [_row(name, point) for point in own])
        for name, own in _by_series(report["points"]).items()
    ]
    if backbones:
        tables.append(_backbone_table(backbones))
    made = (
        f"Forward and backward in {settings['dtype']} on {show.processor(report)} (threads: "
        f"{settings['threads']}) with {show.versions(report, 'torch')}; medians over rounds: "
        f"{settings['rounds']}. Made by `{report['command']}`, {show.commit(report)}."
    )
    paragraphs = (made, *map(sentence, backbones))
    title, picture = "Cost of one adapted linear", "Cost over LoRA's"
    figure = _figure(report["points"])
    return show.Page(tables, title, paragraphs, picture, figure=figure)


def sentence(cost: show.Report) -> str:
    """Return a backbone's FLOPs and what each method adds to them."""
    frozen = cost["variants"]["frozen"]["flops"]
    added = ", ".join(
        f"{NAMES[name]} {found['added_flops']:.2%}"
        for name, found in cost["variants"].items()
        if name != "frozen"
    )
    return (
        f"{cost['backbone']}, {cost['layers']} layers, {cost['tokens']} tokens: the frozen linears "
        f"of a step take {frozen / TERA:.3g} TFLOP; on top come {added}."
    )


def _by_series(points: Sequence[show.Report]) -> dict[str, list[show.Report]]:
    series: dict[str, list[show.Report]] = {}
    for point in points:
        series.setdefault(point["series"], []).append(point)
    return series


def _number(value: float | None, unit: float = 1.0) -> Cell:
    """Return a number in a unit, with about three digits."""
    if value is None:
        return missing()
    shown = value / unit
    return Cell(f"{shown:,.{decimals(shown)}f}", {"": value})


def _percent(value: float) -> Cell:
    return Cell(f"{100 * value:.2f} %", {"": value})


def _row(name: str, point: show.Report) -> Row:
    value = point["value"]
    row: Row = {
        ("", name): label(value) if isinstance(value, str) else Cell(str(value), {"": value}),
        ("", "N × r"): label(f"{point['num_experts']} × {point['rank']}"),
        ("", "tokens, d → k"): label(
            f"{point['tokens']}, {point['in_features']} → {point['out_features']}"
        ),
    }
    found = point["variants"]

    def add(group: str, variants: Sequence[str], key: str, unit: float = 1.0) -> None:
        for variant in variants:
            row[group, NAMES[variant]] = _number(found.get(variant, {}).get(key), unit)

    add("time, ms", list(NAMES), "seconds", MILLI)
    add("time over LoRA's", COMPARED, "ratio_to_lora")
    add("GFLOP", list(NAMES), "flops", GIGA)
    add("kept for the backward, MiB", list(NAMES), "saved_bytes", MIB)
    if found["lora"]["peak_bytes"] is not None:
        add("peak, MiB", list(NAMES), "peak_bytes", MIB)
    return row


def _backbone_table(costs: Sequence[show.Report]) -> Table:
    rows = [
        {"backbone": cost["backbone"], "adapter": NAMES[name], **found}
        for cost in costs
        for name, found in cost["variants"].items()
    ]
    columns: show.Columns = {
        ("", "backbone"): "backbone",
        ("", "adapter"): "adapter",
        ("a step", "TFLOP"): lambda row: _number(row["flops"], TERA),
        ("a step", "s"): lambda row: _number(row["seconds"]),
        ("on top of frozen", "FLOPs"): lambda row: _percent(row["added_flops"]),
        ("on top of frozen", "time"): lambda row: _percent(row["added_seconds"]),
    }
    remark = (
        f"{costs[0]['layers']} layers of the linears above, one after another, for "
        f"{costs[0]['tokens']} tokens; attention, norms, embeddings and the optimiser not included."
    )
    return show.table("backbones", "All linears of a backbone", rows, columns, remark, keys=2)


def _figure(points: Sequence[show.Report]) -> Figure:
    """Return a panel per series: times over LoRA's (solid) and FLOPs over LoRA's (dashed)."""
    series = _by_series(points)
    columns, rows = min(len(series), COLUMNS), -(-len(series) // COLUMNS)
    with plots.style():
        drawn = Figure(figsize=(3.6 * max(columns, 2) + 0.4, 3 * rows), layout="constrained")
        for i, (name, own) in enumerate(series.items()):
            axes = drawn.add_subplot(rows, columns, i + 1)
            axes.set_xlabel(name)
            if i % columns == 0:
                axes.set_ylabel("cost over LoRA's")
            _draw(axes, own)
        _legend(drawn)
    return drawn


def _draw(axes: Axes, points: list[show.Report]) -> None:
    values = [point["value"] for point in points]
    places = _scale(axes, values)
    joined = places == values  # there is nothing between two linears
    axes.axhline(1, color="#777777", linewidth=0.8)
    for name, (colour, marker) in LOOKS.items():
        found = [(x, p["variants"]) for x, p in zip(places, points, strict=True)]
        found = [(x, variants) for x, variants in found if name in variants]
        at = [x for x, _ in found]
        times = [variants[name]["ratio_to_lora"] for _, variants in found]
        flops = [v[name]["flops"] / v["lora"]["flops"] for _, v in found]
        axes.plot(at, times, marker + "-" * joined, color=colour, markersize=4)
        axes.plot(at, flops, "--" if joined else "_", color=colour, linewidth=1)
    axes.set_ylim(bottom=0)


def _scale(axes: Axes, values: list[Any]) -> list[Any]:
    """Label the horizontal axis and return the places on it: numbers are at themselves."""
    words = isinstance(values[0], str)
    places = list(range(len(values))) if words else values
    if not words:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
    turned: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if words else {}
    )
    axes.set_xticks(places, [str(value) for value in values], **turned)
    return places


def _legend(drawn: Figure) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=NAMES[name])
        for name, (colour, marker) in LOOKS.items()
    ]
    styles: tuple[tuple[str, Any], ...] = (("time", "-"), ("FLOPs", "--"))
    for name, style in styles:
        handles.append(Line2D([], [], color="#777777", linestyle=style, label=name))
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles))
