"""Row pairs: how far a row of ours is from its reference row, and how far the paper's are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from furina.reporting import removal, timing
from furina.reporting.accuracy import correctness, difference, scores
from furina.reporting.beside import Beside
from furina.reporting.differences import Difference
from furina.reporting.findings import findings
from furina.reporting.forgetting import General, general_tasks
from furina.reporting.paper import PaperTable
from furina.reporting.significance import Values, bootstrap, run_parts
from furina.reporting.standings import macro, reference_row, served
from furina.reporting.suites import Suite

Measure = Literal["accuracy", "removal", "drop", "time"]
"""What a place of the paper measures: accuracy, also without routers; a relative drop; times."""
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
class Pair:
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
        """Return what the pair says of the paper's; see reproducing.PAIRS."""
        if self.difference is None or self.interval is None:
            return "not measured"
        low, high = self.interval
        if low <= 0 <= high:
            return "within noise"
        return "agrees" if self.difference * self.paper > 0 else "differs"


def row_pairs(suite: Suite, paper: PaperTable, measure: Measure) -> list[Pair]:
    """Return a pair for each row of ours whose difference the paper gives, be it run or not."""
    reference = reference_row(suite, paper)
    if reference is None or reference not in paper.ours:
        return []
    return list(_MEASURES[measure](suite, paper, reference))


def _accuracy(suite: Suite, paper: PaperTable, reference: str) -> Iterator[Pair]:
    beside, found = Beside.of(suite, paper, reference), findings(suite, reference)
    for row, theirs in paper.ours.items():
        gap = beside.difference(theirs)
        if gap is None or row == reference:
            continue
        finding = found.get(row)
        compared = finding.comparison if finding else None
        ends = (compared.low, compared.high) if compared else None
        own = finding.difference if finding else None
        yield Pair(row, own, ends, gap, macro(suite, row), beside.value(theirs))


def _removal(suite: Suite, paper: PaperTable, reference: str) -> Iterator[Pair]:
    """Yield the rows as trained and, of routed mixtures, what is left without the router."""
    yield from _accuracy(suite, paper, reference)
    beside = Beside.of(suite, paper, reference)
    for theirs, row in removal.PAPERS_ROWS.items():
        gap = beside.difference(theirs) if theirs in paper.rows else None
        if gap is not None:
            found, usual = _without_router(suite, row, reference), macro(suite, reference)
            ends = found.interval if found else None
            yield Pair(
                f"{row}, router removed",
                100 * found.value if found else None,
                (100 * ends[0], 100 * ends[1]) if ends else None,
                gap,
                100 * found.value + usual if found and usual is not None else None,
                beside.value(theirs),
            )


def _without_router(suite: Suite, row: str, reference: str) -> Difference | None:
    """Return the mean over tasks of what is left of a mixture minus the reference, a fraction."""
    sides = (row, removal.REMOVED), (reference, served(suite, reference))
    found = [difference(suite, task, *sides) for task in suite.tasks]
    known = [each for each in found if each is not None]
    if len(known) < len(suite.tasks) or not known:
        return None
    errors = [each.stderr for each in known]
    stderr = None if None in errors else math.hypot(*filter(None, errors)) / len(errors)
    return Difference(statistics.fmean(each.value for each in known), stderr, paired=True)


def _drop(suite: Suite, paper: PaperTable, reference: str) -> Iterator[Pair]:
    columns, generals = tuple(paper.columns), general_tasks(suite)
    usual = paper.value(paper.ours[reference], columns)
    for row, theirs in paper.ours.items():
        value = paper.value(theirs, columns)
        if row == reference or value is None or usual is None:
            continue
        parts = _drop_parts(generals, row, reference)
        found = bootstrap(parts, np.random.default_rng(0)) if parts else None
        ends = (found.low, found.high) if found else None
        own = found.difference if found else None
        yield Pair(row, own, ends, value - usual, _level(generals, row), value)


def _drop_parts(generals: Sequence[General], row: str, reference: str) -> list[Values]:
    """Return what the difference of two rows' mean relative drops is the sum of, as fractions.

    First come each task's questions, then the deviations of each row's seeds, of mean 0; the base
    model's accuracy is taken as it is. Empty where a task has no per-question outputs of both.
    """
    parts: list[Values] = []
    for general in generals:
        ours, theirs = (_correct(general, each) for each in (row, reference))
        if not general.base or ours is None or theirs is None or ours.keys() != theirs.keys():
            return []
        scale = 100 / general.base / len(generals)
        parts.append(np.array([scale * (theirs[key] - ours[key]) for key in sorted(ours)]))
    parts += run_parts(
        [sign * drop for drop in _mean_drops(generals, each)]
        for each, sign in ((row, 1), (reference, -1))
    )
    return parts


def _level(generals: Sequence[General], row: str) -> float | None:
    drops = [general.drops(row) for general in generals]
    if not drops or not all(drops):
        return None
    return statistics.fmean(statistics.fmean(found.values()) for found in drops)


def _correct(general: General, row: str) -> dict[str, float] | None:
    found = scores(general.suite, row, general.task, served(general.suite, row))
    return correctness(found) if found else None


def _mean_drops(generals: Sequence[General], row: str) -> list[float]:
    """Return a row's mean relative drop by seed, as fractions, of the seeds that have all tasks."""
    drops = [general.drops(row) for general in generals]
    whole = sorted(set.intersection(*map(set, drops))) if drops else []
    return [statistics.fmean(found[seed] for found in drops) / 100 for seed in whole]


def _time(suite: Suite, paper: PaperTable, reference: str) -> Iterator[Pair]:
    """Yield the differences of total times, in milliseconds."""
    columns = tuple(paper.columns)[-1:]
    usual = paper.value(paper.ours[reference], columns)
    for row, theirs in paper.ours.items():
        value = paper.value(theirs, columns)
        if row != reference and value is not None and usual is not None:
            found = timing.longer(suite, row, reference)
            ends = found.interval if found else None
            own, level = found.value if found else None, timing.total(suite, row)
            yield Pair(row, own, ends, value - usual, level, value)


_MEASURES: dict[Measure, Callable[[Suite, PaperTable, str], Iterator[Pair]]] = {
    "accuracy": _accuracy,
    "removal": _removal,
    "drop": _drop,
    "time": _time,
}
