"""Maps of the experts' activity: experts, layers, linears, tasks and tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from furina.records import ActivityRecord, TokenExample
from furina.records.activity import kind_of, layer_of
from furina.reporting.figures.heatmap import FEW, ColourScale, draw, expert_colours
from furina.reporting.figures.plots import COLUMNS, style

TOKENS = 40
"""The last tokens of an example, which are shown."""
STRIPS = 4
"""Tasks of which an example is shown."""
LEGIBLE = 0x250
"""Characters from here on may have no glyph in the figures' font."""


def activity_figures(records: Mapping[Path, ActivityRecord]) -> dict[str, Figure]:
    """Return the maps of each row by name; of several seeds the lowest is shown."""
    chosen: dict[tuple[str, str], tuple[Path, ActivityRecord]] = {}
    for path, record in sorted(records.items(), key=lambda pair: (pair[1].seed or 0, pair[0])):
        chosen.setdefault((record.row, record.task), (path, record))
    return {
        f"activity-{name}--{path.stem}": figure
        for path, record in chosen.values()
        for name, figure in _maps(record).items()
    }


def _maps(record: ActivityRecord) -> dict[str, Figure]:
    """Return the figures that the record has numbers for, by name."""
    with style():
        made = {"load": load(record), "share": share(record)}
        if record.several_tasks:
            made["tasks"] = agreement(record)
        if record.examples:
            made["tokens"] = tokens(record)
    return made


def load(record: ActivityRecord) -> Figure:
    """Return expert by layer, a panel per task: the load in one linear of each layer."""
    places = [record.linears.index(name) for name in record.shown]
    most = max(record.experts[place] for place in places)
    scale = ColourScale(0.0, max(max(t.frequency[place]) for t in record.tasks for place in places))
    figure, panels = _panels(len(record.tasks), _height(len(places)))
    for task, axes in zip(record.tasks, panels, strict=True):
        loads = [task.frequency[place] for place in places]
        padded = [[*row, *[None] * (most - len(row))] for row in loads]
        colours = [[scale.colour(value) for value in row] for row in padded]
        draw(axes, colours, list(map(layer_of, record.shown)), _numbered(most))
        axes.set_title(task.task, fontsize=10)
        axes.set_xlabel("expert")
    panels[0].set_ylabel(f"layer ({_listed(map(kind_of, record.shown))})")
    scale.bar(figure, panels, "share of the load")
    figure.suptitle(f"{record.row}: load of the experts", fontsize=10)
    return figure


def share(record: ActivityRecord) -> Figure:
    """Return layer by linear, a panel per task: the top-K share."""
    layers = sorted({layer_of(name) for name in record.linears})
    kinds = list(dict.fromkeys(kind_of(name) for name in record.linears))
    places = {(layer_of(name), kind_of(name)): i for i, name in enumerate(record.linears)}
    highest = max(max(task.top_k_share) for task in record.tasks)
    scale = ColourScale(min(record.even_top_k_share), highest)
    figure, panels = _panels(len(record.tasks), _height(len(layers)) + 0.6)
    for task, axes in zip(record.tasks, panels, strict=True):
        found = [[places.get((layer, kind)) for kind in kinds] for layer in layers]
        colours = [
            [None if place is None else scale.colour(task.top_k_share[place]) for place in row]
            for row in found
        ]
        draw(axes, colours, layers, kinds, rotation=60)
        axes.set_title(task.task, fontsize=10)
    panels[0].set_ylabel("layer")
    scale.bar(figure, panels, f"top-{record.top_k} share")
    figure.suptitle(f"{record.row}: share of the {record.top_k} most active experts", fontsize=10)
    return figure


def agreement(record: ActivityRecord) -> Figure:
    """Return task by task, the first on top: the overlap of their loads, mean over linears."""
    names = [task.task for task in record.tasks]
    means = [
        [statistics.fmean(record.overlap(one, other)) for other in record.tasks]
        for one in reversed(record.tasks)
    ]
    scale, side = ColourScale(min(map(min, means)), 1.0), 1.6 + 0.6 * len(names)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    colours = [[scale.colour(value) for value in row] for row in means]
    draw(axes, colours, names[::-1], names, rotation=60)
    for y, row in enumerate(means):
        for x, value in enumerate(row):
            colour = "white" if scale.is_dark(value) else "black"
            axes.text(x + 0.5, y + 0.5, f"{value:.2f}", color=colour, ha="center", va="center")
    axes.set_title(f"{record.row}: overlap of the loads", fontsize=10)
    return figure


def tokens(record: ActivityRecord) -> Figure:
    """Return token by layer, for an example of each of the first tasks: the most active expert.

    It is that of one linear in each layer; experts of two layers have nothing but a number in
    common.
    """
    firsts: dict[str, TokenExample] = {}
    for example in record.examples:
        firsts.setdefault(example.task, example)
    strips = list(firsts.values())[:STRIPS]
    layers = [layer_of(name) for name in record.shown]
    colours = expert_colours(max(record.experts))
    longest = max(len(example.tokens[-TOKENS:]) for example in strips)
    size = 2.2 + 0.2 * longest, (_height(len(layers)) + 0.5) * len(strips) + 0.6
    figure = Figure(figsize=size, layout="constrained")
    for i, example in enumerate(strips):
        axes = figure.add_subplot(len(strips), 1, i + 1)
        _strip(axes, example, layers, colours)
        axes.set_xlim(0, longest)
    if len(colours) <= FEW:
        handles = [Patch(color=colour, label=str(i)) for i, colour in enumerate(colours, 1)]
        figure.legend(
            handles=handles, title="expert", loc="outside lower center", ncols=len(handles)
        )
    else:
        figure.supxlabel(f"experts 1 (dark) to {len(colours)} (light)", fontsize=9)
    kinds = _listed(map(kind_of, record.shown))
    figure.suptitle(f"{record.row}: most active expert of each token in {kinds}", fontsize=10)
    return figure


def _strip(
    axes: Axes, example: TokenExample, layers: Sequence[int], colours: Sequence[str]
) -> None:
    """Draw one example; a line stands before its answer."""
    shown = [legible(token) for token in example.tokens[-TOKENS:]]
    rows = [[colours[expert] for expert in row[-TOKENS:]] for row in example.expert]
    draw(axes, rows, layers, shown, rotation=90)
    axes.set_title(example.task, fontsize=10)
    axes.set_ylabel("layer")
    if example.answer_length < len(shown):
        axes.axvline(len(shown) - example.answer_length, color="black", linewidth=1.2)


def legible(token: str) -> str:
    """Return a token's text with what has no glyph, or no width, made visible."""
    text = token.replace("\n", "\\n").replace("\t", "\\t").strip(" ") or "·"
    return "".join(c if c.isprintable() and ord(c) < LEGIBLE else "□" for c in text)


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    columns, rows = min(count, COLUMNS), math.ceil(count / COLUMNS)
    figure = Figure(figsize=(2.6 * columns + 1.4, height * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def _height(rows: int) -> float:
    return 1.3 + 0.09 * rows


def _numbered(count: int) -> list[str]:
    """Return the experts' numbers from 1, some of them if they are many."""
    step = math.ceil(count / 10)
    return [str(i + 1) if i % step == 0 else "" for i in range(count)]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
