"""Bootstrap intervals of a median, for ratios that are paired by round."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence

DRAWS = 2000


def median_interval(
    values: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the values' median; draws are seeded."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    outside = round((1 - level) / 2 * DRAWS)
    return medians[outside], medians[-1 - outside]
