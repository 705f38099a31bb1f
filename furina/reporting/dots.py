"""Every seed as a dot: differences to a reference row, and curves over a varied setting."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from furina.reporting.beside import Beside
from furina.reporting.findings import Finding, findings
from furina.reporting.paper import PaperTable
from furina.reporting.plots import look, panels, style
from furina.reporting.standings import by_seed, reference_row
from furina.reporting.suites import FREE_KEYS, Suite

HEIGHT = 0.46
"""Inches of a row."""
SPREAD = 0.22
"""How far from the middle of its row the first and last task are drawn, in rows."""
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
    suite: Suite, paper: PaperTable | None = None, reference: str | None = None
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
    gaps = _gaps(suite, paper, reference)
    names = [*suite.rows, *(row for row in gaps if row not in suite.rows)]
    with style():
        size = 7.6, HEIGHT * len(names) + 1.3
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot(1, 1, 1)
        for height, row in enumerate(names):
            _draw_dots(axes, suite, row, reference, height)
            if row in found:
                _draw_mean(axes, found[row], height)
            if row in gaps:
                axes.plot(gaps[row], height + PAPER_BELOW, **PAPER)
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":", zorder=1)
        labels = [row if row in suite.rows else f"{row} (not run)" for row in names]
        axes.set_yticks(range(len(names)), labels)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"difference to {reference}, points ({suite.metric})")
        handles = _task_handles(suite)
        handles.append(Line2D([], [], label="mean of tasks, 95 % interval", **MEAN))
        handles += [Line2D([], [], label="the paper's difference", **PAPER)] if gaps else []
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _gaps(suite: Suite, paper: PaperTable | None, reference: str) -> dict[str, float]:
    """Return the paper's differences to the reference by row of ours, where they are known."""
    if paper is None:
        return {}
    beside = Beside.of(suite, paper, reference)
    known = {row: beside.difference(theirs) for row, theirs in paper.ours.items()}
    return {row: gap for row, gap in known.items() if gap is not None and row != reference}


def _draw_dots(axes: Axes, suite: Suite, row: str, reference: str, height: int) -> None:
    steps = max(len(suite.tasks) - 1, 1)
    for i, task in enumerate(suite.tasks):
        ours, theirs = by_seed(suite, row, task), by_seed(suite, reference, task)
        if not ours or not theirs:
            continue
        colour, marker = look(i)
        level = height + (2 * i / steps - 1) * SPREAD if len(suite.tasks) > 1 else height
        middle = statistics.fmean(theirs.values())
        dots = [value - middle for value in ours.values()]
        heights = [level] * len(dots)
        axes.plot(dots, heights, marker, color=colour, markersize=4.5, mew=0, alpha=0.8, zorder=2)


def _draw_mean(axes: Axes, finding: Finding, height: int) -> None:
    if finding.comparison is not None:
        ends = [finding.comparison.low, finding.comparison.high]
        axes.plot(ends, [height, height], color="black", linewidth=1.6, zorder=3)
    axes.plot(finding.difference, height, **{**MEAN, "linestyle": ""}, zorder=4)


def _task_handles(suite: Suite) -> list[Line2D]:
    looks = [look(i) for i in range(len(suite.tasks))]
    return [
        Line2D([], [], linestyle="", marker=marker, color=colour, markersize=5, label=task)
        for task, (colour, marker) in zip(suite.tasks, looks, strict=True)
    ]


def setting_curves(suite: Suite) -> Figure | None:
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
        handles = _task_handles(suite)
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_curve(
    axes: Axes, suite: Suite, task: str, rows: Sequence[str], appearance: tuple[str, str]
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


def varied_settings(suite: Suite) -> dict[str, dict[float, str]]:
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


def _settings(suite: Suite, row: str) -> dict[str, object]:
    """Return what a row says itself, an adapter's options as adapter.NAME."""
    config = next(run.record.config for run in suite.runs if run.record.row == row)
    adapter = config.get("adapter")
    options = adapter if isinstance(adapter, dict) else {}
    plain = {key: value for key, value in config.items() if key not in {*IDENTITY, "adapter"}}
    return {**plain, **{f"adapter.{key}": value for key, value in options.items()}}
