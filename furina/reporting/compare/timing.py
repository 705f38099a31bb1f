"""How much longer a row's model generates than the reference's, from medians and quartiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from furina.records import Spread
from furina.reporting.read.scores import served
from furina.reporting.read.statistics import Difference
from furina.reporting.read.suites import Results

FEWEST = 5
"""Repeats from which on quartiles say something about a spread."""
QUARTILES = statistics.NormalDist().inv_cdf(0.75) * 2
"""Distance of a normal distribution's quartiles, in standard deviations."""
MEDIAN = math.sqrt(math.pi / 2)
"""Standard error of a normal sample's median, in those of its mean."""


def medians(spreads: Sequence[Spread]) -> Spread:
    """Return the medians over runs of their medians and quartiles, and all their repeats."""
    q1, median, q3 = (
        statistics.median(getattr(each, name) for each in spreads)
        for name in ("q1", "median", "q3")
    )
    return Spread(median, q1, q3, sum(each.n for each in spreads))


def longer(suite: Results, row: str, reference: str) -> Difference | None:
    """Return a row's total time minus the reference's, in milliseconds; None if not timed.

    A run times its model beside the base model, and a machine is not equally fast in all runs: what
    is subtracted are times over their own base's, and the difference is of the median base's time.
    """
    ratios = [_over_base(suite, each) for each in (row, reference)]
    if None in ratios:
        return None
    (ours, our_error), (theirs, their_error) = (each for each in ratios if each)
    base = _base(suite)
    return Difference(base * (ours - theirs), base * math.hypot(our_error, their_error), False)


def total(suite: Results, row: str) -> float | None:
    """Return a row's total time in milliseconds, found as in `longer`; None if not timed."""
    ratio = _over_base(suite, row)
    return _base(suite) * ratio[0] if ratio else None


def _base(suite: Results) -> float:
    """Return the median over runs of the base model's total time."""
    times = (time for run in suite.runs if run.succeeded for time in run.record.latency)
    return statistics.median(time.total_ms.median for time in times if time.variant == "base")


def _over_base(suite: Results, row: str) -> tuple[float, float] | None:
    """Return the mean over runs of a row's time over the base model's, and its standard error."""
    found = list(_ratios(suite, row, served(suite, row)))
    if not found:
        return None
    error = math.hypot(*(error for _, error in found)) / len(found)
    return statistics.fmean(ratio for ratio, _ in found), error


def _ratios(suite: Results, row: str, variant: str) -> Iterator[tuple[float, float]]:
    for run in suite.select(row):
        times = {time.variant: time.total_ms for time in run.record.latency}
        if variant in times and "base" in times:
            pair = times[variant], times["base"]
            if min(spread.n for spread in pair) >= FEWEST:
                ratio = pair[0].median / pair[1].median
                yield ratio, ratio * math.hypot(*(_relative_error(each) for each in pair))


def _relative_error(spread: Spread) -> float:
    deviation = (spread.q3 - spread.q1) / QUARTILES
    return MEDIAN * deviation / math.sqrt(spread.n) / spread.median
