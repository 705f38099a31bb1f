"""Means, spreads and differences with their standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 1.96
"""Standard errors of a 95 % interval."""


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
        return self.value - LEVEL * self.stderr, self.value + LEVEL * self.stderr


def stdev(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, None below two values."""
    return statistics.stdev(values) if len(values) > 1 else None


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of the mean, None below two values."""
    deviation = stdev(values)
    return None if deviation is None else deviation / math.sqrt(len(values))


def paired(treated: Mapping[str, float], control: Mapping[str, float]) -> Difference:
    """Return mean(treated − control) over the keys, which both hold (KeyError otherwise)."""
    differences = [treated[key] - control[key] for key in sorted(treated)]
    return Difference(statistics.fmean(differences), standard_error(differences), paired=True)


def unpaired(treated: Sequence[float], control: Sequence[float]) -> Difference:
    """Return the difference of means with Welch's standard error."""
    value = statistics.fmean(treated) - statistics.fmean(control)
    errors = (standard_error(treated), standard_error(control))
    return Difference(value, _combine(*errors), paired=False)


def of_scores(
    value: float, stderr: float, control_value: float, control_stderr: float
) -> Difference:
    """Return the difference of two scores of which only the standard errors are known."""
    return Difference(value - control_value, math.hypot(stderr, control_stderr), paired=False)


def _combine(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else math.hypot(first, second)
