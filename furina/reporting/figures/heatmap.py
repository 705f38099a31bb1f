"""Heat maps as vectors: a picture's bytes would depend on who compressed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from furina.reporting.figures.plots import COLOURS

LEVELS = 16
LABELS = 8
"""Up to so many rows bear a label."""
FEW = len(COLOURS)
_BOX = (Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY)


@dataclass(frozen=True)
class ColourScale:
    """Numbers from `low` to `high` in LEVELS colours, dark to light."""

    low: float
    high: float

    def colour(self, value: float | None) -> str | None:
        """Return the colour of a number, None for none."""
        if value is None:
            return None
        part = (value - self.low) / (self._top - self.low)
        return to_hex(_colormap()(min(max(int(part * LEVELS), 0), LEVELS - 1)))

    def is_dark(self, value: float) -> bool:
        """Tell whether white text is easier to read on a number's colour than black."""
        return value < self.low + 0.55 * (self._top - self.low)

    def bar(self, figure: Figure, axes: Sequence[Axes], name: str) -> None:
        """Draw the legend of the colours beside `axes`."""
        step = (self._top - self.low) / LEVELS
        norm = BoundaryNorm([self.low + i * step for i in range(LEVELS + 1)], LEVELS)
        mappable = ScalarMappable(norm, _colormap())
        ticks = [self.low + i * 4 * step for i in range(LEVELS // 4 + 1)]
        bar = figure.colorbar(mappable, ax=list(axes), label=name, ticks=ticks, format="%.2f")
        bar.outline.set_visible(False)

    @property
    def _top(self) -> float:
        return self.high if self.high > self.low else self.low + 1.0


def _colormap() -> Colormap:
    return mpl.colormaps["viridis"].resampled(LEVELS)


def expert_colours(count: int) -> list[str]:
    """Return a colour per expert: well told apart if they are few, else from dark to light."""
    if count <= FEW:
        return list(COLOURS[:count])
    return [to_hex(mpl.colormaps["viridis"](i / (count - 1))) for i in range(count)]


def draw(
    axes: Axes,
    colours: Sequence[Sequence[str | None]],
    rows: Sequence[object],
    columns: Sequence[object],
    rotation: float = 0,
) -> None:
    """Fill the cells from the bottom row up, None left blank, and name rows and columns.

    Neighbours of one colour in a row are one rectangle, and all of one colour one path. Of many
    rows some bear their name.
    """
    boxes: dict[str, list[tuple[int, int, int]]] = {}
    for y, row in enumerate(colours):
        x = 0
        for colour, run in groupby(row):
            width = len(list(run))
            if colour is not None:
                boxes.setdefault(colour, []).append((x, y, width))
            x += width
    for colour, found in boxes.items():
        axes.add_patch(PathPatch(_path(found), facecolor=colour, edgecolor=colour, linewidth=0.2))
    axes.set_xlim(0, len(columns))
    axes.set_ylim(0, len(rows))
    step = math.ceil(len(rows) / LABELS)
    axes.set_yticks([y + 0.5 for y in range(0, len(rows), step)])
    axes.set_yticklabels([str(name) for name in rows[::step]], parse_math=False)
    axes.set_xticks([x + 0.5 for x in range(len(columns))])
    turned: dict[str, Any] = {"rotation": rotation, "parse_math": False}
    if 0 < rotation < 90:
        turned |= {"ha": "right", "rotation_mode": "anchor"}
    axes.set_xticklabels([str(name) for name in columns], **turned)
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _path(boxes: Sequence[tuple[int, int, int]]) -> Path:
    """Return rectangles of height 1 at (x, y) as one path."""
    vertices = [
        corner
        for x, y, width in boxes
        for corner in ((x, y), (x + width, y), (x + width, y + 1), (x, y + 1), (x, y))
    ]
    return Path(vertices, _BOX * len(boxes))
