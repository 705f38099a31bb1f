"""What a row of a suite scored: the model that stands for it, by task and by seed."""

from __future__ import annotations

import statistics

from furina.errors import nearest
from furina.records import RecordError
from furina.reporting.accuracy import scores
from furina.reporting.paper import PaperTable
from furina.reporting.suites import Suite

USUAL = ("lora", "base")
OWN = ("lora", "furina", "base")
"""The same where the paper has no table: a study of FURINA's parts compares them with the whole."""


def served(suite: Suite, row: str) -> str:
    """Return the variant that stands for a row: merged where it merges, else unmerged."""
    taken = (score for run in suite.select(row) for score in run.record.evaluations)
    merges = any((s.variant, s.protocol) == ("merged", suite.protocol) for s in taken)
    return "merged" if merges else "unmerged"


def by_seed(suite: Suite, row: str, task: str) -> dict[int, float]:
    """Return a row's accuracy on a task by seed, in %."""
    found = scores(suite, row, task, served(suite, row))
    return {run.record.seed: 100 * score.value for run, score in found}


def macro(suite: Suite, row: str) -> float | None:
    """Return the mean over the suite's tasks of the mean over seeds, in %; None without a task."""
    found = [by_seed(suite, row, task) for task in suite.tasks]
    if not found or not all(found):
        return None
    return statistics.fmean(statistics.fmean(seeds.values()) for seeds in found)


def macro_by_seed(suite: Suite, row: str) -> dict[int, float]:
    """Return the mean over the suite's tasks, in %, of each seed that scored them all."""
    found = [by_seed(suite, row, task) for task in suite.tasks]
    whole = set.intersection(*map(set, found)) if found else set()
    return {seed: statistics.fmean(seeds[seed] for seeds in found) for seed in sorted(whole)}


def reference_row(
    suite: Suite, paper: PaperTable | None = None, wanted: str | None = None
) -> str | None:
    """Return the row that the others are compared with, None where there is none.

    That is the wanted one, else LoRA where there is one, else FURINA if the paper has no table of
    the suite, else base; but where the paper's table has neither of those that the suite has, the
    first of its rows that the suite has, so that both tables compare with the same. Raises
    RecordError where the wanted one has no record.
    """
    if wanted is not None and wanted not in suite.rows:
        raise RecordError(f"{suite.name} has no row {wanted!r}.{nearest(wanted, suite.rows)}")
    if wanted is not None:
        return wanted
    usual = [row for row in (USUAL if paper else OWN) if row in suite.rows]
    shared = [row for row in paper.ours if row in suite.rows] if paper else []
    both = [row for row in usual if row in shared]
    return next(iter([*both, *shared, *usual]), None)
