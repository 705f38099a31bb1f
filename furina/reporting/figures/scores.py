"""Accuracy against latency, and the task loss in training: a panel per task, a look per row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from furina.records import Spread, Training
from furina.reporting.compare.timing import medians
from furina.reporting.figures.plots import COLOURS, look, panels, style
from furina.reporting.read.scores import scores
from furina.reporting.read.suites import Results

WINDOW = 9
Point = tuple[Spread, float, float]
Curve = Sequence[tuple[int, float]]


def _looks(suite: Results) -> dict[str, tuple[str, str]]:
    """Return each row's colour and marker."""
    tuned = [row for row in suite.rows if row != "base"]
    return {"base": ("black", "*"), **{row: look(i) for i, row in enumerate(tuned)}}


def accuracy_latency(suite: Results) -> Figure | None:
    """Return accuracy against latency, a panel per task, None where nothing was timed.

    Hollow markers are unmerged models, filled ones merged; an arrow joins the two of a row.
    """
    timed = [t for run in suite.runs if run.succeeded for t in run.record.latency]
    if not timed:
        return None
    with style():
        figure, axes_of = panels(len(suite.tasks), 3.3)
        for task, axes in zip(suite.tasks, axes_of, strict=True):
            axes.set_title(task, fontsize=10)
            axes.set_xlabel(
                f"time for {timed[0].prompt_tokens} tokens in, {timed[0].new_tokens} out, ms"
            )
            for row, appearance in _looks(suite).items():
                _draw_row(axes, suite, row, task, appearance)
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.margins(0.15)
        axes_of[0].set_ylabel(f"accuracy ({suite.metric}), %")
        _legend(figure, suite)
    return figure


def _draw_row(axes: Axes, suite: Results, row: str, task: str, appearance: tuple[str, str]) -> None:
    colour, marker = appearance
    points = {variant: _point(suite, row, task, variant) for variant in ("unmerged", "merged")}
    for variant, point in points.items():
        if point is None:
            continue
        time, value, stderr = point
        hollow = variant == "unmerged" and row != "base"
        axes.errorbar(
            time.median,
            value,
            xerr=[[time.median - time.q1], [time.q3 - time.median]],
            yerr=stderr,
            fmt=marker,
            color=colour,
            markerfacecolor="white" if hollow else colour,
            markeredgecolor=colour if hollow else "white",
            markersize=13 if row == "base" else 8,
            elinewidth=0.8,
            zorder=3,
        )
    unmerged, merged = points["unmerged"], points["merged"]
    if row == "base" and unmerged:
        axes.axhline(unmerged[1], color="black", linewidth=0.8, linestyle=":", zorder=1)
        axes.axvline(unmerged[0].median, color="black", linewidth=0.8, linestyle=":", zorder=1)
    elif unmerged and merged:
        arrow = {"arrowstyle": "->", "color": colour, "shrinkA": 7, "shrinkB": 7, "linewidth": 1}
        ends = (merged[0].median, merged[1]), (unmerged[0].median, unmerged[1])
        axes.annotate("", *ends, arrowprops=arrow)


def _point(suite: Results, row: str, task: str, variant: str) -> Point | None:
    """Return (total time, accuracy in %, its standard error) of one model on one task."""
    found = [score for _, score in scores(suite, row, task, variant)]
    times = _times(suite, row, "base" if row == "base" else variant)
    if not found or not times:
        return None
    value = statistics.fmean(score.value for score in found)
    return medians(times), 100 * value, 100 * statistics.fmean(score.stderr for score in found)


def _times(suite: Results, row: str, variant: str) -> list[Spread]:
    rows = suite.rows if row == "base" else [row]
    runs = [run for name in rows for run in suite.select(name)]
    return [t.total_ms for run in runs for t in run.record.latency if t.variant == variant]


def _legend(figure: Figure, suite: Results) -> None:
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=colour, label=row)
        for row, (colour, marker) in _looks(suite).items()
        if row in suite.rows
    ]
    for name, face in (("unmerged", "white"), ("merged", "#777777")):
        handles.append(
            Line2D([], [], linestyle="", marker="o", color="#777777", mfc=face, label=name)
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def loss_curves(suite: Results) -> Figure | None:
    """Return the task loss by step, a panel per task, None where nothing was trained.

    Thin lines are single steps, thick ones their running mean over WINDOW steps. A row whose
    auxiliary loss was not recorded by itself says that it is part of the curve.
    """
    if not any(run.record.training for run in suite.runs):
        return None
    with style():
        figure, axes_of = panels(len(suite.trained), 3.0)
        for task, axes in zip(suite.trained, axes_of, strict=True):
            axes.set_title(task, fontsize=10)
            axes.set_xlabel("optimiser step")
            for place, (row, (colour, _)) in enumerate(_looks(suite).items()):
                dashes = "--" if place > len(COLOURS) else "-"  # base is the first, and has none
                for i, training in enumerate(_trainings(suite, row, task)):
                    label = f"{row}, auxiliary loss included" if _is_mixed(training) else row
                    name = "_" if i else label
                    _draw_curve(axes, _task_curve(training), colour, dashes, name)
        axes_of[0].set_ylabel("task loss, nats per answer token")
        rows = {str(line.get_label()): line for axes in axes_of for line in axes.lines}
        rows = {label: line for label, line in rows.items() if not label.startswith("_")}
        figure.legend(rows.values(), rows, loc="outside lower center", ncols=min(len(rows), 4))
    return figure


def _trainings(suite: Results, row: str, task: str) -> list[Training]:
    records = [run.record for run in suite.runs]
    trained = [r.training for r in records if (r.row, r.task) == (row, task) and r.training]
    return [training for training in trained if training.loss_curve]


def _is_mixed(training: Training) -> bool:
    known = len(training.auxiliary_curve) == len(training.loss_curve)
    return training.gradient_ratio is not None and not known


def _task_curve(training: Training) -> Curve:
    auxiliary = dict(training.auxiliary_curve)
    return [(step, loss - auxiliary.get(step, 0.0)) for step, loss in training.loss_curve]


def _draw_curve(axes: Axes, curve: Curve, colour: str, dashes: str, name: str) -> None:
    steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
    half = WINDOW // 2
    smooth = [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, dashes, color=colour, linewidth=0.6, alpha=0.35)
    axes.plot(steps, smooth, dashes, color=colour, linewidth=1.8, label=name)
