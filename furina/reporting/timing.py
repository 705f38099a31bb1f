"""How much longer a row's model generates than the reference's, from medians and quartiles."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator

from furina.records import Spread
from furina.reporting.differences import Difference
from furina.reporting.standings import served
from furina.reporting.suites import Suite

FEWEST = 5
"""Repeats from which on quartiles say something about a spread."""
QUARTILES = statistics.NormalDist().inv_cdf(0.75) * 2
"""Distance of a normal distribution's quartiles, in standard deviations."""
MEDIAN = math.sqrt(math.pi / 2)
"""Standard error of a normal sample's median, in those of its mean."""


def longer(suite: Suite, row: str, reference: str) -> Difference | None:
    """Return a row's total time minus the reference's, in milliseconds; None if not timed.

    A run times its model beside the base model, and a machine is not equally fast in all runs: what
    is subtracted are times over their own base's, and the difference is of the median base's time.
    """
    rows = [_over_base(suite, each) for each in (row, reference)]
    if not all(rows):
        return None
    means = [statistics.fmean(ratio for ratio, _ in found) for found in rows]
    errors = [math.hypot(*(error for _, error in found)) / len(found) for found in rows]
    bases = [
        time.total_ms.median
        for run in suite.runs
        if run.succeeded
        for time in run.record.latency
        if time.variant == "base"
    ]
    base = statistics.median(bases)
    return Difference(base * (means[0] - means[1]), base * math.hypot(*errors), paired=False)


def _over_base(suite: Suite, row: str) -> list[tuple[float, float]]:
    """Return the row's total time over the base model's, with its standard error, of each run."""
    return list(_ratios(suite, row, served(suite, row)))


def _ratios(suite: Suite, row: str, variant: str) -> Iterator[tuple[float, float]]:
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
