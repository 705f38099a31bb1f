"""Row pairs one by one: what a status counts, as a table beside the suite's others."""

from __future__ import annotations

from collections.abc import Sequence

from furina.reporting.cells import Cell, Row, Table, build, decimals, label, missing
from furina.reporting.pairs import UNITS, Measure, Pair
from furina.reporting.paper import PaperTable
from furina.reporting.reproducing import PAIRS
from furina.reporting.studies import UNMEASURED
from furina.reporting.suites import Suite


def pair_table(
    suite: Suite, paper: PaperTable, measure: Measure, pairs: Sequence[Pair], reference: str
) -> Table | None:
    """Return a line per row pair, None where the paper gives no difference."""
    if not pairs:
        return None
    rows = [_line(pair, *UNITS[measure], reference) for pair in pairs]
    title = f"{suite.name}: row pairs with {reference}, beside the paper's {paper.place}"
    return build("pairs", title, rows, (PAIRS,))


def _line(pair: Pair, unit: str, apart: str, reference: str) -> Row:
    gap = f"difference to {reference}, {apart}"
    cells: Row = {("", "row"): label(pair.row)}
    for group, level, difference, interval in (
        ("ours", pair.level, pair.difference, pair.interval),
        ("in the paper", pair.paper_level, pair.paper, None),
    ):
        cells[group, unit] = _number(level, "")
        cells[group, gap] = _number(difference, "+", interval)
    cells["", "verdict"] = label(pair.verdict)
    return cells


def _number(value: float | None, sign: str, interval: tuple[float, float] | None = None) -> Cell:
    if value is None:
        return missing(UNMEASURED)
    places = min(decimals(value), 1)
    text, numbers = f"{value:{sign}.{places}f}", {"": value}
    if interval is not None:
        text += f" [{interval[0]:+.{places}f}, {interval[1]:+.{places}f}]"
        numbers |= {"low": interval[0], "high": interval[1]}
    return Cell(text, numbers)
