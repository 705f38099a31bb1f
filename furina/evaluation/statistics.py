"""Statistics of right and wrong answers; plain Python, so that reports need no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from furina.errors import DataError
from furina.evaluation.samples import Sample


class PairedGain(NamedTuple):
    """How much better A answers than B on the same `n` questions, and how sure that is.

    `gained` are wrong in B and right in A, `lost` the other way round. `difference` is
    (gained - lost) / n, `stderr` the standard error of the mean of the paired differences
    (McNemar's counts, Wald's variance), and `z` their ratio: 0 if no question differs.
    """

    difference: float
    stderr: float
    z: float
    n: int
    gained: int
    lost: int


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


def paired_gain(a: Sequence[Sample], b: Sequence[Sample], metric: str = "acc") -> PairedGain:
    """Compare two models question by question: how much higher A's `metric` is than B's.

    Raises DataError unless both answered the very same questions, once each.
    """
    right_a, right_b = _by_question(a, metric), _by_question(b, metric)
    if right_a.keys() != right_b.keys():
        only = len(right_a.keys() ^ right_b.keys())
        raise DataError(
            f"{only} questions were answered by only one of the two models, so they cannot be "
            "paired: score both on the same test subset."
        )
    changes = [right - right_b[name] for name, right in right_a.items()]
    gained, lost = changes.count(1), changes.count(-1)
    difference, stderr = (gained - lost) / len(changes), standard_error(changes)
    if difference == 0:
        z = 0.0
    else:
        z = difference / stderr if stderr else math.copysign(math.inf, difference)
    return PairedGain(difference, stderr, z, len(changes), gained, lost)


def _by_question(samples: Sequence[Sample], metric: str) -> dict[str, bool]:
    right = {sample.id: sample.is_correct(metric) for sample in samples}
    if not right or len(right) != len(samples):
        raise DataError("Per-question outputs must hold each question once, and at least one.")
    return right
