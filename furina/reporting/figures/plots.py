"""Figures from records: colour-blind safe, and byte for byte the same from the same records."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colours, black kept for the base model.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "furina",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.dpi": 100,
    "savefig.dpi": 150,
}
COLUMNS = 3


@contextmanager
def style() -> Iterator[None]:
    """Draw in this module's style, whatever the user's is."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def svg(figure: Figure) -> str:
    """Return a figure as SVG without a date, so that equal figures are equal bytes."""
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def look(index: int) -> tuple[str, str]:
    """Return the colour and marker of a series: no two of the first 49 look alike."""
    turn, colour = divmod(index, len(COLOURS))
    return COLOURS[colour], MARKERS[(colour + turn) % len(MARKERS)]


def panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with that many axes, `height` inches each."""
    columns, rows = min(count, COLUMNS), math.ceil(count / COLUMNS)
    size = 3.6 * max(columns, 2) + 0.4, height * rows
    figure = Figure(figsize=size, layout="constrained")
    return figure, [figure.add_subplot(rows, columns, i + 1) for i in range(count)]


def handle(index: int, name: str) -> Line2D:
    """Return the legend's entry of a series."""
    colour, marker = look(index)
    return Line2D([], [], linestyle="", marker=marker, color=colour, markersize=5, label=name)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the vertical axis with rows, the first at the top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
