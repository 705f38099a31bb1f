"""Differences with their standard errors, a bootstrap, and corrected p-values.

`bootstrap` gives the error of a sum of means, each part resampled by itself. Questions are one kind
of part. Training runs are another, where there are two or more seeds: by how much a run's share
deviates from its mean over seeds. Drawing n of n seeds would give (n − 1)/n of their variance, half
of it for two seeds, so the deviations are widened by √(n/(n − 1)); and few runs tell their variance
badly, so they are widened once more, by Student's 97.5th percentile over the normal one. What
single answers add to a run's error counts among the questions too: the interval is rather too wide
than too narrow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Z_95 = 1.96
"""Standard errors of a 95 % interval."""
RESAMPLES = 9999
BATCH = 1000
"""Resamples that are drawn at once, which bounds the memory."""
PERCENTILES = (2.5, 97.5)
FEWEST_PAIRS = 6
"""Pairs from which on Wilcoxon's test has p < 0.05."""
DIGITS = 12
"""Decimals that count: equal means of three seeds may differ in the last bits."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A difference of two means; `stderr` is None where nothing can be said about it."""

    value: float
    stderr: float | None
    paired: bool

    @property
    def z(self) -> float | None:
        """Return the difference in standard errors; 0 where nothing differs at all."""
        if self.value == 0:
            return 0.0
        return self.value / self.stderr if self.stderr else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval, None where there is no standard error."""
        if self.stderr is None:
            return None
        return self.value - Z_95 * self.stderr, self.value + Z_95 * self.stderr


@dataclass(frozen=True)
class Comparison:
    """By how many points one row's macro mean is above another's, its 95 % interval and p."""

    difference: float
    low: float
    high: float
    p: float

    @property
    def interval(self) -> tuple[float, float]:
        """Return the ends of the 95 % interval."""
        return self.low, self.high


def stdev(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None below two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, None below two values."""
    deviation = stdev(values)
    return None if deviation is None else deviation / math.sqrt(len(values))


def paired(treated: Mapping[str, float], control: Mapping[str, float]) -> Difference:
    """Return mean(treated − control) over the keys, which both hold (KeyError otherwise)."""
    return of_pairs([treated[key] - control[key] for key in sorted(treated)])


def of_pairs(differences: Sequence[float]) -> Difference:
    """Return the mean of differences that are pairs' own."""
    return Difference(statistics.fmean(differences), standard_error(differences), paired=True)


def unpaired(treated: Sequence[float], control: Sequence[float]) -> Difference:
    """Return the difference of means with Welch's standard error."""
    errors = [error for each in (treated, control) if (error := standard_error(each)) is not None]
    value = statistics.fmean(treated) - statistics.fmean(control)
    return Difference(value, math.hypot(*errors) if len(errors) == 2 else None, paired=False)


def of_scores(
    value: float, stderr: float, control_value: float, control_stderr: float
) -> Difference:
    """Return the difference of two scores of which only the standard errors are known."""
    return Difference(value - control_value, math.hypot(stderr, control_stderr), paired=False)


def run_parts(shares: Iterable[Sequence[float]]) -> list[Values]:
    """Return the widened deviations of all that has several runs, for `bootstrap`.

    `shares` are, by what was trained, the runs' shares in the difference; see the module.
    """
    parts = [_widened(runs) for runs in shares if len(runs) > 1]
    return [part * _student(sum(len(each) - 1 for each in parts)) for part in parts]


def _widened(shares: Sequence[float]) -> Values:
    mean, n = statistics.fmean(shares), len(shares)
    return np.array([(share - mean) * math.sqrt(n / (n - 1)) for share in shares])


def _student(freedom: int) -> float:
    """Return Student's 97.5th percentile in units of the normal one."""
    # The import takes a second, which a report of single seeds need not wait for.
    from scipy import stats  # type: ignore[import-untyped]

    return float(stats.t.ppf(PERCENTILES[1] / 100, freedom) / stats.norm.ppf(PERCENTILES[1] / 100))


def bootstrap(parts: Sequence[Values], generator: np.random.Generator) -> Comparison:
    """Return the sum of the parts' means in points, each part resampled by itself."""
    draws = np.zeros(RESAMPLES)
    for part in parts:
        draws += _means(part, generator)
    draws = np.round(draws, DIGITS)
    low, high = np.percentile(draws, PERCENTILES)
    beyond = 1 + min(np.count_nonzero(draws <= 0), np.count_nonzero(draws >= 0))
    value = sum(float(part.mean()) for part in parts)
    p = min(1.0, 2 * beyond / (RESAMPLES + 1))
    return Comparison(100 * value, 100 * float(low), 100 * float(high), float(p))


def _means(values: Values, generator: np.random.Generator) -> Values:
    """Return the means of RESAMPLES resamples of values. Shape: (n,) → (RESAMPLES,).

    A mean needs only how often each value was drawn, and answers have few values: drawing the
    counts is the same distribution as drawing n answers, in a fraction of the time.
    """
    distinct, counts = np.unique(np.round(values, DIGITS), return_counts=True)
    shares, n = counts / len(values), len(values)
    sizes = [min(BATCH, RESAMPLES - start) for start in range(0, RESAMPLES, BATCH)]
    drawn = (generator.multinomial(n, shares, size=size) @ distinct / n for size in sizes)
    return np.concatenate(list(drawn))


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Return the two-sided p of the signed-rank test, None below six differences."""
    rounded = np.round(differences, DIGITS - 2)  # these are in %
    if len(rounded) < FEWEST_PAIRS:
        return None
    from scipy import stats

    return float(stats.wilcoxon(rounded).pvalue) if rounded.any() else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values corrected for their number (Holm 1979), in the order given.

    The i-th smallest of m is multiplied by m − i + 1, and none is below a smaller one's.
    """
    ordered = pd.Series(p_values, dtype=float).sort_values(kind="stable")
    corrected = (ordered * range(len(ordered), 0, -1)).clip(upper=1.0).cummax()
    return {name: float(corrected[name]) for name in p_values}
