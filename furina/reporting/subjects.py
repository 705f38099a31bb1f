"""Figures of suites whose subject is not accuracy: what is forgotten, and what training costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from furina.reporting.dots import HEIGHT, MEAN, PAPER, PAPER_BELOW
from furina.reporting.forgetting import General, general_tasks
from furina.reporting.paper import PaperTable
from furina.reporting.plots import look, panels, style
from furina.reporting.suites import Suite

COST = "training_cost"
"""The suite about what training costs: others are run several at a time, which moves times."""
SPREAD = 0.18
"""How far from the middle of its row the first and last task are drawn, in rows."""


def drop_dots(suite: Suite, paper: PaperTable | None = None) -> Figure | None:
    """Return each row's relative drops on tasks that no run trained; None where there are none.

    A dot is one seed on one task, a bar the mean over tasks, a hollow diamond the paper's mean.
    """
    generals = [general for general in general_tasks(suite) if general.base]
    tuned = [row for row in suite.rows if row != "base"]
    rows = [row for row in tuned if any(general.drops(row) for general in generals)]
    if not rows:
        return None
    theirs = _papers(paper, rows)
    with style():
        figure = Figure(figsize=(7.6, HEIGHT * len(rows) + 1.5), layout="constrained")
        axes = figure.add_subplot(1, 1, 1)
        _name_rows(axes, rows)
        for height, row in enumerate(rows):
            _draw_drops(axes, generals, row, height)
            if row in theirs:
                axes.plot(theirs[row], height + PAPER_BELOW, **PAPER)
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":", zorder=1)
        axes.set_xlabel("relative drop, % of the base model's accuracy")
        handles = [_handle(i, general.group) for i, general in enumerate(generals)]
        handles.append(Line2D([], [], label="mean of tasks", **{**MEAN, "linestyle": ""}))
        handles += [Line2D([], [], label="the paper's mean", **PAPER)] if theirs else []
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _papers(paper: PaperTable | None, rows: Sequence[str]) -> dict[str, float]:
    """Return the paper's mean drop of each row where it is known."""
    if paper is None:
        return {}
    columns = tuple(paper.columns)
    found = {row: paper.value(paper.ours[row], columns) for row in rows if row in paper.ours}
    return {row: value for row, value in found.items() if value is not None}


def _draw_drops(axes: Axes, generals: Sequence[General], row: str, height: int) -> None:
    steps = max(len(generals) - 1, 1)
    means = []
    for i, general in enumerate(generals):
        drops = list(general.drops(row).values())
        if drops:
            colour, marker = look(i)
            levels = [height + (2 * i / steps - 1) * SPREAD] * len(drops)
            axes.plot(drops, levels, marker, color=colour, markersize=5, mew=0, zorder=2)
            means.append(statistics.fmean(drops))
    axes.plot(statistics.fmean(means), height, **{**MEAN, "linestyle": ""}, zorder=4)


def _handle(index: int, label: str) -> Line2D:
    colour, marker = look(index)
    return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=5, label=label)


def training_costs(suite: Suite) -> Figure | None:
    """Return each row's seconds per step and peak memory, a dot per run; only of suite COST."""
    trained = {
        row: [run.record.training for run in suite.select(row) if run.record.training]
        for row in suite.rows
    }
    costs: dict[str, Mapping[str, Sequence[float]]] = {
        "seconds per step": {row: [t.seconds / t.steps for t in trained[row]] for row in trained},
        "peak memory, GB": {
            row: [t.peak_memory_bytes / 10**9 for t in trained[row]] for row in trained
        },
    }
    rows = [row for row in suite.rows if trained[row]]
    if not rows or suite.name.partition("-")[0] != COST:
        return None
    with style():
        figure, axes_of = panels(len(costs), HEIGHT * len(rows) + 0.9)
        for (name, values), axes in zip(costs.items(), axes_of, strict=True):
            for height, row in enumerate(rows):
                axes.barh(height, statistics.fmean(values[row]), 0.6, color=look(0)[0], zorder=2)
                dots = [height] * len(values[row])
                axes.plot(values[row], dots, "o", color="black", markersize=4, zorder=3)
            _name_rows(axes, rows)
            axes.set_xlabel(name)
    return figure


def _name_rows(axes: Axes, rows: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
