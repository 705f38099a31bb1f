"""How far each row of a suite is from a reference row, and whether that is supported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from furina.reporting.significance import Comparison, comparisons, holm, signed_rank
from furina.reporting.standings import by_seed, macro
from furina.reporting.suites import Suite

LEVEL = 0.05


@dataclass(frozen=True)
class Finding:
    """By how many points a row's mean is above the reference's; both p with Holm's correction.

    `comparison` and `p` are None without per-question outputs, `signed` (Wilcoxon's test, not
    corrected) and `signed_p` below six pairs of task and seed.
    """

    difference: float
    comparison: Comparison | None
    p: float | None
    signed: float | None
    signed_p: float | None
    pairs: int


@lru_cache(maxsize=128)  # a table, a figure and the status of a place ask for the same
def findings(suite: Suite, reference: str | None) -> Mapping[str, Finding]:
    """Compare every other row that scored all tasks with the reference, where that did."""
    means = {row: macro(suite, row) for row in suite.rows}
    theirs = means.get(reference) if reference else None
    if reference is None or theirs is None:
        return {}
    ours = {row: mean for row, mean in means.items() if mean is not None and row != reference}
    found = comparisons(suite, reference)
    p = holm({row: comparison.p for row, comparison in found.items()})
    ranked = {row: signed_rank(suite, row, reference) for row in ours}
    signed_p = holm({row: value for row, (value, _) in ranked.items() if value is not None})
    return {
        row: Finding(
            mean - theirs,
            found.get(row),
            p.get(row),
            ranked[row][0],
            signed_p.get(row),
            ranked[row][1],
        )
        for row, mean in ours.items()
    }


def supported(suite: Suite, reference: str | None, found: Mapping[str, Finding]) -> list[str]:
    """Return the rows with the highest mean, if their advantage over the reference is supported.

    It is where p with Holm's correction is below LEVEL and the spread over seeds is part of it:
    with one seed p speaks of models and not of methods.
    """
    means = {row: mean for row in suite.rows if (mean := macro(suite, row)) is not None}
    return [
        row
        for row, finding in found.items()
        if means[row] == max(means.values())
        and finding.p is not None
        and finding.p < LEVEL
        and _is_seeded(suite, row)
        and _is_seeded(suite, str(reference))
    ]


def _is_seeded(suite: Suite, row: str) -> bool:
    """Tell whether a row has two or more seeds of every task; the base model needs none."""
    return row == "base" or all(len(by_seed(suite, row, task)) > 1 for task in suite.tasks)
