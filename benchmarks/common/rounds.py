"""Rounds in random order, and what is told of them: failures, spreads, paired ratios."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from furina.errors import FurinaError

T = TypeVar("T")
Failed = dict[str, str]
"""Why a variant has no result."""
DRAWS = 2000
Z = 1.959964
"""Of a two-sided interval of 95 %."""


def interleaved(
    runs: Mapping[str, Callable[[int], T]],
    rounds: int,
    order: random.Random,
    failed: Failed | None = None,
) -> dict[str, list[T]]:
    """Call each once a round with the round's number, in a new order; return what they gave.

    So a slow minute of the machine falls on all of them. With `failed`, one that raises is noted
    there and left out of all rounds.
    """
    found: dict[str, list[T]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in order.sample(list(found), k=len(found)):
            try:
                found[name].append(runs[name](number))
            except Exception as error:
                if failed is None:
                    raise
                fail(failed, name, error)
                del found[name]
        print(f"round {number + 1} of {rounds}", flush=True)
    return found


def fail(failed: Failed, name: str, reason: Exception | str) -> None:
    """Note and print why a variant has no result; the others go on."""
    plain = isinstance(reason, FurinaError | str)
    failed[name] = str(reason) if plain else f"{type(reason).__name__}: {reason}"
    print(f"{name}: failed: {failed[name]}", flush=True)


def make_each(names: Iterable[str], make: Callable[[str], T], failed: Failed) -> dict[str, T]:
    """Make something of every name; note why what fails is left out."""
    found: dict[str, T] = {}
    for name in names:
        try:
            found[name] = make(name)
        except Exception as error:
            fail(failed, name, error)
    return found


def timed(run: Callable[[], T]) -> tuple[float, T]:
    """Return the seconds that a call takes, and what it gives, after the device has finished."""
    synchronise()
    start = time.perf_counter()
    found = run()
    synchronise()
    return time.perf_counter() - start, found


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles; a single value is all three."""
    more = [*values, *values][: max(len(values), 2)]
    q1, median, q3 = statistics.quantiles(more, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def quotients(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Divide round by round: what slowed the machine down in a round cancels."""
    return [a / b for a, b in zip(one, other, strict=True)]


def median_interval(
    values: Sequence[float], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the values' median; draws are seeded."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    outside = round((1 - level) / 2 * DRAWS)
    return medians[outside], medians[-1 - outside]


def wilson(count: int, n: int) -> tuple[float, float]:
    """Return the ends of Wilson's 95 % interval of the share `count`/`n`."""
    share, square = count / n, Z**2 / n
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / n + square / (4 * n))
    # Rounding would leave a hair outside the range.
    return 0.0 if count == 0 else middle - half, 1.0 if count == n else middle + half


def changed_ratio(count: int, other: int) -> float:
    """Return the ratio of two counts, half a change added to each: none is a count too."""
    return (count + 0.5) / (other + 0.5)
