"""Every seed as a dot: differences to a row, drops, costs, and curves over a varied setting."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from furina.records import Training
from furina.reporting.compare.forgetting import general_tasks
from furina.reporting.compare.paper import PaperColumns
from furina.reporting.compare.rows import findings, reference_row
from furina.reporting.figures.plots import handle, look, name_rows, panels, style
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.scores import by_seed
from furina.reporting.read.suites import FREE_KEYS, Results

HEIGHT = 0.46
"""Inches of a row."""
COST = "training_cost"
"""The suite about what training costs: others are run several at a time, which moves times."""
PAPER_BELOW = 0.36
"""How far below the middle of its row the paper's mark is drawn, in rows."""
FEWEST_VALUES = 3
"""Values of a setting that make a curve."""
MEAN: dict[str, Any] = {
    "linestyle": "-",
    "marker": "|",
    "markersize": 15,
    "mew": 2.2,
    "color": "black",
}
PAPER: dict[str, Any] = {
    "linestyle": "",
    "marker": "d",
    "markersize": 7,
    "mfc": "none",
    "mec": "black",
}
IDENTITY = {*FREE_KEYS, "suite", "row", "task"}
"""What tells runs apart without being a setting."""


def difference_dots(
    suite: Results, paper: PaperTable | None = None, reference: str | None = None
) -> Figure | None:
    """Return each row's difference to a reference row, in points; None where nothing compares.

    A dot is one seed on one task, minus the reference's mean over seeds on it; so the reference's
    own dots show how far its seeds are apart. A bar is the difference of the means over all tasks
    with its 95 % interval, a hollow diamond the paper's difference to the same row.
    """
    reference = reference_row(suite, paper, reference)
    found = findings(suite, reference)
    if reference is None or not found:
        return None
    columns = PaperColumns.of(suite, paper, reference) if paper else None
    gaps = {} if columns is None else _known(columns.paper, columns.difference)
    gaps.pop(reference, None)
    names = [*suite.rows, *(row for row in gaps if row not in suite.rows)]
    with style():
        figure, axes = _row_figure(len(names), 1.3)
        for height, row in enumerate(names):
            series = [_gaps(suite, row, reference, task) for task in suite.tasks]
            _draw_dots(axes, series, height, 0.22, markersize=4.5, alpha=0.8)
            if row in found:
                comparison = found[row].comparison
                if comparison is not None:
                    ends = comparison.interval
                    axes.plot(ends, [height, height], color="black", linewidth=1.6, zorder=3)
                axes.plot(found[row].difference, height, **{**MEAN, "linestyle": ""}, zorder=4)
            if row in gaps:
                axes.plot(gaps[row], height + PAPER_BELOW, **PAPER)
        name_rows(axes, [row if row in suite.rows else f"{row} (not run)" for row in names])
        axes.set_xlabel(f"difference to {reference}, points ({suite.metric})")
        handles = [handle(i, task) for i, task in enumerate(suite.tasks)]
        handles.append(Line2D([], [], label="mean of tasks, 95 % interval", **MEAN))
        handles += [Line2D([], [], label="the paper's difference", **PAPER)] if gaps else []
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def drop_dots(suite: Results, paper: PaperTable | None = None) -> Figure | None:
    """Return each row's relative drops on tasks that no run trained; None where there are none.

    A dot is one seed on one task, a bar the mean over tasks, a hollow diamond the paper's mean.
    """
    generals = [general for general in general_tasks(suite) if general.base]
    tuned = [row for row in suite.rows if row != "base"]
    drops = {row: [list(each.drops(row).values()) for each in generals] for row in tuned}
    rows = [row for row in tuned if any(drops[row])]
    if not rows:
        return None
    columns = tuple(paper.columns) if paper else ()
    known = _known(paper, lambda row: paper.value(row, columns)) if paper else {}
    theirs = {row: known[row] for row in rows if row in known}
    with style():
        figure, axes = _row_figure(len(rows), 1.5)
        name_rows(axes, rows)
        for height, row in enumerate(rows):
            _draw_dots(axes, drops[row], height, 0.18, markersize=5)
            mean = statistics.fmean(statistics.fmean(values) for values in drops[row] if values)
            axes.plot(mean, height, **{**MEAN, "linestyle": ""}, zorder=4)
            if row in theirs:
                axes.plot(theirs[row], height + PAPER_BELOW, **PAPER)
        axes.set_xlabel("relative drop, % of the base model's accuracy")
        handles = [handle(i, general.group) for i, general in enumerate(generals)]
        handles.append(Line2D([], [], label="mean of tasks", **{**MEAN, "linestyle": ""}))
        handles += [Line2D([], [], label="the paper's mean", **PAPER)] if theirs else []
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _row_figure(rows: int, more: float) -> tuple[Figure, Axes]:
    """Return axes for a line per row, with one at zero; `more` are the inches beside the rows."""
    figure = Figure(figsize=(7.6, HEIGHT * rows + more), layout="constrained")
    axes = figure.add_subplot(1, 1, 1)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":", zorder=1)
    return figure, axes


def _known(paper: PaperTable, value: Callable[[str], float | None]) -> dict[str, float]:
    """Return a number of the paper's by row of ours, where it is known."""
    found = {row: value(theirs) for row, theirs in paper.ours.items()}
    return {row: number for row, number in found.items() if number is not None}


def _gaps(suite: Results, row: str, reference: str, task: str) -> list[float]:
    ours, theirs = by_seed(suite, row, task), by_seed(suite, reference, task)
    if not theirs:
        return []
    middle = statistics.fmean(theirs.values())
    return [value - middle for value in ours.values()]


def _draw_dots(
    axes: Axes, series: Sequence[Sequence[float]], row: int, spread: float, **look_of: Any
) -> None:
    """Draw the dots of a row, each task's `spread` rows at most from the middle."""
    steps = max(len(series) - 1, 1)
    for i, values in enumerate(series):
        colour, marker = look(i)
        level = row + (2 * i / steps - 1) * spread if len(series) > 1 else row
        if values:
            levels = [level] * len(values)
            axes.plot(values, levels, marker, color=colour, mew=0, zorder=2, **look_of)


def training_costs(suite: Results) -> Figure | None:
    """Return each row's seconds per step and peak memory, a dot per run; only of suite COST."""
    found = {
        row: [run.record.training for run in suite.select(row) if run.record.training]
        for row in suite.rows
    }
    trained = {row: runs for row, runs in found.items() if runs}
    if not trained or suite.name.partition("-")[0] != COST:
        return None
    costs: dict[str, Callable[[Training], float]] = {
        "seconds per step": lambda training: training.seconds / training.steps,
        "peak memory, GB": lambda training: training.peak_memory_bytes / 10**9,
    }
    with style():
        figure, axes_of = panels(len(costs), HEIGHT * len(trained) + 0.9)
        for (name, cost), axes in zip(costs.items(), axes_of, strict=True):
            for height, runs in enumerate(trained.values()):
                values = [cost(training) for training in runs]
                axes.barh(height, statistics.fmean(values), 0.6, color=look(0)[0], zorder=2)
                dots = [height] * len(values)
                axes.plot(values, dots, "o", color="black", markersize=4, zorder=3)
            name_rows(axes, list(trained))
            axes.set_xlabel(name)
    return figure


def setting_curves(suite: Results) -> Figure | None:
    """Return accuracy over each setting that rows differ in and in nothing else; None without one.

    A panel per setting, evenly spaced values, a line per task through the means over seeds with a
    dot per seed; dotted lines are the base model.
    """
    settings = varied_settings(suite)
    if not settings:
        return None
    with style():
        figure, axes_of = panels(len(settings), 3.3)
        for (setting, rows), axes in zip(settings.items(), axes_of, strict=True):
            axes.set_xlabel(setting.removeprefix("adapter.").replace("_", " "))
            axes.set_xticks(range(len(rows)), [f"{value:g}" for value in rows])
            for i, task in enumerate(suite.tasks):
                _draw_curve(axes, suite, task, list(rows.values()), look(i))
            axes.margins(0.1)
        axes_of[0].set_ylabel(f"accuracy ({suite.metric}), %")
        handles = [handle(i, task) for i, task in enumerate(suite.tasks)]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_curve(
    axes: Axes, suite: Results, task: str, rows: Sequence[str], appearance: tuple[str, str]
) -> None:
    colour, marker = appearance
    found = {x: list(by_seed(suite, row, task).values()) for x, row in enumerate(rows)}
    means = {x: statistics.fmean(values) for x, values in found.items() if values}
    axes.plot(list(means), list(means.values()), color=colour, linewidth=1.6, zorder=2)
    for x, values in found.items():
        axes.plot(
            [x] * len(values), values, marker, color=colour, markersize=5, alpha=0.8, zorder=3
        )
    for value in by_seed(suite, "base", task).values():
        axes.axhline(value, color=colour, linewidth=0.9, linestyle=":", zorder=1)


def varied_settings(suite: Results) -> dict[str, dict[float, str]]:
    """Return by setting the rows that differ in nothing else, each by its value, in order.

    Only what rows say themselves is known: a row that leaves a setting at its default has no place
    on its curve. A curve has at least three values.
    """
    configs = {row: _settings(suite, row) for row in suite.rows if row != "base"}
    names = sorted({name for config in configs.values() for name in config})
    found: dict[str, dict[float, str]] = {}
    for name in names:
        curves: dict[str, dict[float, str]] = {}
        for row, config in configs.items():
            value = config.get(name)
            if isinstance(value, (int, float)):
                others = {key: other for key, other in config.items() if key != name}
                curves.setdefault(json.dumps(others, sort_keys=True), {})[float(value)] = row
        longest = max(curves.values(), key=len, default={})
        if len(longest) >= FEWEST_VALUES:
            found[name] = dict(sorted(longest.items()))
    return found


def _settings(suite: Results, row: str) -> dict[str, object]:
    """Return what a row says itself, an adapter's options as adapter.NAME."""
    config = next(run.record.config for run in suite.runs if run.record.row == row)
    adapter = config.get("adapter")
    options = adapter if isinstance(adapter, dict) else {}
    plain = {key: value for key, value in config.items() if key not in {*IDENTITY, "adapter"}}
    return {**plain, **{f"adapter.{key}": value for key, value in options.items()}}
