"""Statistics of right and wrong answers; plain Python, so that reports need no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from furina.errors import DataError


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, sample deviation / sqrt(n), as lm-eval does.

    Raises DataError for fewer than two values, which have none.
    """
    n = len(values)
    if n < 2:
        raise DataError(f"A standard error needs at least 2 questions, not {n}: score more.")
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def is_suspect(value: float, stderr: float, chance: float) -> bool:
    """Return whether a score is not above chance by more than two standard errors."""
    return value <= chance + 2 * stderr
