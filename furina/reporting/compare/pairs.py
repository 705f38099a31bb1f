"""Row pairs: how far a row of ours is from its reference row, and how far the paper's are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from furina.reporting.compare import timing
from furina.reporting.compare.forgetting import General, general_tasks, mean_drop, mean_drops
from furina.reporting.compare.paper import PAPERS_ROWS, REMOVED, PaperColumns
from furina.reporting.compare.rows import findings, reference_row
from furina.reporting.read.paper import Measure, PaperTable
from furina.reporting.read.scores import correctness, difference, macro, served
from furina.reporting.read.statistics import Difference, Values, bootstrap, run_parts
from furina.reporting.read.suites import Results

UNITS: dict[Measure, tuple[str, str]] = {
    "accuracy": ("%", "points"),
    "removal": ("%", "points"),
    "drop": ("relative drop, %", "points"),
    "time": ("total time, ms", "ms"),
}
"""What a row has and what a difference is of, by measure."""
Verdict = Literal["agrees", "within noise", "differs", "not measured"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class RowPair:
    """A row of ours beside its reference row, and the same two rows of the paper.

    `difference` is ours minus the reference's and `interval` its 95 % interval, None where that was
    not measured; `paper` is the paper's difference, in the same unit. `level` and `paper_level` are
    what the rows themselves have, ours and the paper's.
    """

    row: str
    difference: float | None
    interval: tuple[float, float] | None
    paper: float
    level: float | None = None
    paper_level: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Return what the pair says of the paper's; see tables.status.PAIRS."""
        if self.difference is None or self.interval is None:
            return "not measured"
        low, high = self.interval
        if low <= 0 <= high:
            return "within noise"
        return "agrees" if self.difference * self.paper > 0 else "differs"


def row_pairs(suite: Results, paper: PaperTable, measure: Measure) -> list[RowPair]:
    """Return a pair for each row of ours whose difference the paper gives, be it run or not."""
    reference = reference_row(suite, paper)
    if reference is None or reference not in paper.ours:
        return []
    return list(_MEASURES[measure](suite, paper, reference))


def _accuracy(suite: Results, paper: PaperTable, reference: str) -> Iterator[RowPair]:
    papers, found = PaperColumns.of(suite, paper, reference), findings(suite, reference)
    for row, theirs in paper.ours.items():
        gap = papers.difference(theirs)
        if gap is None or row == reference:
            continue
        finding = found.get(row)
        ends = finding.comparison.interval if finding and finding.comparison else None
        own = finding.difference if finding else None
        yield RowPair(row, own, ends, gap, macro(suite, row), papers.value(theirs))


def _removal(suite: Results, paper: PaperTable, reference: str) -> Iterator[RowPair]:
    """Yield the rows as trained and, of routed mixtures, what is left without the router."""
    yield from _accuracy(suite, paper, reference)
    papers = PaperColumns.of(suite, paper, reference)
    for theirs, row in PAPERS_ROWS.items():
        gap = papers.difference(theirs) if theirs in paper.rows else None
        if gap is not None:
            found, usual = _without_router(suite, row, reference), macro(suite, reference)
            ends = found.interval if found else None
            yield RowPair(
                f"{row}, router removed",
                100 * found.value if found else None,
                (100 * ends[0], 100 * ends[1]) if ends else None,
                gap,
                100 * found.value + usual if found and usual is not None else None,
                papers.value(theirs),
            )


def _without_router(suite: Results, row: str, reference: str) -> Difference | None:
    """Return the mean over tasks of what is left of a mixture minus the reference, a fraction."""
    sides = (row, REMOVED), (reference, served(suite, reference))
    found = [difference(suite, task, *sides) for task in suite.tasks]
    known = [each for each in found if each is not None]
    if len(known) < len(suite.tasks) or not known:
        return None
    errors = [each.stderr for each in known]
    stderr = None if None in errors else math.hypot(*filter(None, errors)) / len(errors)
    return Difference(statistics.fmean(each.value for each in known), stderr, paired=True)


def _drop(suite: Results, paper: PaperTable, reference: str) -> Iterator[RowPair]:
    columns, generals = tuple(paper.columns), general_tasks(suite)
    usual = paper.value(paper.ours[reference], columns)
    for row, theirs in paper.ours.items():
        value = paper.value(theirs, columns)
        if row == reference or value is None or usual is None:
            continue
        parts = _drop_parts(generals, row, reference)
        found = bootstrap(parts, np.random.default_rng(0)) if parts else None
        ends = found.interval if found else None
        own = found.difference if found else None
        yield RowPair(row, own, ends, value - usual, mean_drop(generals, row), value)


def _drop_parts(generals: Sequence[General], row: str, reference: str) -> list[Values]:
    """Return what the difference of two rows' mean relative drops is the sum of, as fractions.

    First come each task's questions, then the deviations of each row's seeds, of mean 0; the base
    model's accuracy is taken as it is. Empty where a task has no per-question outputs of both.
    """
    parts: list[Values] = []
    for general in generals:
        suite, task = general.suite, general.task
        ours, theirs = (
            correctness(suite, each, task, served(suite, each)) for each in (row, reference)
        )
        if not general.base or ours is None or theirs is None or ours.keys() != theirs.keys():
            return []
        scale = 100 / general.base / len(generals)
        parts.append(np.array([scale * (theirs[key] - ours[key]) for key in sorted(ours)]))
    parts += run_parts(
        [sign * drop / 100 for drop in mean_drops(generals, each)]
        for each, sign in ((row, 1), (reference, -1))
    )
    return parts


def _time(suite: Results, paper: PaperTable, reference: str) -> Iterator[RowPair]:
    """Yield the differences of total times, in milliseconds."""
    columns = tuple(paper.columns)[-1:]
    usual = paper.value(paper.ours[reference], columns)
    for row, theirs in paper.ours.items():
        value = paper.value(theirs, columns)
        if row != reference and value is not None and usual is not None:
            found = timing.longer(suite, row, reference)
            ends = found.interval if found else None
            own, level = found.value if found else None, timing.total(suite, row)
            yield RowPair(row, own, ends, value - usual, level, value)


_MEASURES: dict[Measure, Callable[[Results, PaperTable, str], Iterator[RowPair]]] = {
    "accuracy": _accuracy,
    "removal": _removal,
    "drop": _drop,
    "time": _time,
}
