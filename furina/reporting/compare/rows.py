"""Is one row better than another? A paired bootstrap over questions and seeds, and Wilcoxon's test.

The quantity is the difference D of two rows' macro means: the mean over tasks of the mean over
seeds and questions. Two things would come out otherwise if all were done again, and both are
resampled:

* the questions, within each task: a question's difference is that of its means over seeds, so the
  two rows are paired by question;
* the training runs, where there are two or more seeds: by how much a run's share in D deviates from
  its mean over seeds. A run is one training, be it of one task or of a mixture. Runs of the two
  rows are paired by seed where both have the same seeds.

One resample is D plus the error of each part, drawn with replacement; see `read.statistics`. The
interval is the 2.5th to 97.5th percentile of the resamples, p twice the smaller share of them on
one side of 0. Where a row has one seed its training runs cannot be resampled: p then speaks of
models, not of methods.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from furina.errors import nearest
from furina.records import RecordError
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.scores import by_seed, macro, question_differences, scores, served
from furina.reporting.read.statistics import (
    Comparison,
    bootstrap,
    holm,
    run_parts,
    wilcoxon,
)
from furina.reporting.read.suites import Results

ALPHA = 0.05
USUAL = ("lora", "base")
OWN = ("lora", "furina", "base")
"""The same where the paper has no table: a study of FURINA's parts compares them with the whole."""


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


def reference_row(
    suite: Results, paper: PaperTable | None = None, wanted: str | None = None
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


@lru_cache(maxsize=128)  # a table, a figure and the status of a place ask for the same
def findings(suite: Results, reference: str | None) -> Mapping[str, Finding]:
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
        row: Finding(mean - theirs, found.get(row), p.get(row), signed, signed_p.get(row), pairs)
        for row, mean in ours.items()
        for signed, pairs in [ranked[row]]
    }


def supported(suite: Results, reference: str | None, found: Mapping[str, Finding]) -> list[str]:
    """Return the rows with the highest mean, if their advantage over the reference is supported.

    It is where p with Holm's correction is below ALPHA and the spread over seeds is part of it:
    with one seed p speaks of models and not of methods.
    """
    means = {row: mean for row in suite.rows if (mean := macro(suite, row)) is not None}
    return [
        row
        for row, finding in found.items()
        if means[row] == max(means.values())
        and finding.p is not None
        and finding.p < ALPHA
        and _is_seeded(suite, row)
        and _is_seeded(suite, str(reference))
    ]


def _is_seeded(suite: Results, row: str) -> bool:
    """Tell whether a row has two or more seeds of every task; the base model needs none."""
    return row == "base" or all(len(by_seed(suite, row, task)) > 1 for task in suite.tasks)


def comparisons(suite: Results, reference: str) -> dict[str, Comparison]:
    """Compare each row with a reference: the models that stand for them, over all tasks.

    A row without per-question outputs of every task is left out. Raises RecordError where two runs
    answered different questions of a task.
    """
    found = {}
    theirs = reference, served(suite, reference)
    for row in suite.rows:
        ours = row, served(suite, row)
        parts = [question_differences(suite, task, ours, theirs) for task in suite.tasks]
        questions = [np.array(part) / len(parts) for part in parts if part is not None]
        if row != reference and len(questions) == len(parts) > 0:
            runs = run_parts(_run_shares(suite, row, reference))
            generator = np.random.default_rng(_seed(row, reference))
            found[row] = bootstrap([*questions, *runs], generator)
    return found


def _run_shares(suite: Results, row: str, reference: str) -> Iterator[list[float]]:
    """Yield the runs' shares in D of all that was trained, paired by seed where that can be."""
    ours, theirs = _shares(suite, row), _shares(suite, reference)
    for trained in {**ours, **theirs}:
        first, second = ours.get(trained, {}), theirs.get(trained, {})
        if first.keys() == second.keys():
            yield [first[seed] - second[seed] for seed in first]
        else:
            yield list(first.values())
            yield [-share for share in second.values()]


def _shares(suite: Results, row: str) -> dict[str, dict[int, float]]:
    """Return by what was trained and by seed what the run adds to its row's macro mean.

    That is one number even where a run is scored on several tasks: its errors on them are not
    independent.
    """
    shares: dict[str, dict[int, float]] = {}
    for task in suite.tasks:
        for run, score in scores(suite, row, task, served(suite, row)):
            runs = shares.setdefault(run.record.task, {})
            share = score.value / len(suite.tasks)
            runs[run.record.seed] = runs.get(run.record.seed, 0.0) + share
    return shares


def _seed(*names: str) -> int:
    """Return the generator's seed, which depends on the two rows' names alone."""
    return int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "big")


def signed_rank(suite: Results, row: str, reference: str) -> tuple[float | None, int]:
    """Return p of Wilcoxon's signed-rank test and the number of (task, seed) pairs.

    A pair is of the two rows' scores on one task with one seed; the base model, which has no seed,
    stands opposite each. p is None below six pairs.
    """
    pairs: list[float] = []
    for task in suite.tasks:
        ours, theirs = by_seed(suite, row, task), by_seed(suite, reference, task)
        if row == "base":
            ours = _for_each(theirs, ours)
        if reference == "base":
            theirs = _for_each(ours, theirs)
        pairs += [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return wilcoxon(pairs), len(pairs)


def _for_each(seeds: Iterable[int], of_base: Mapping[int, float]) -> dict[int, float]:
    return dict.fromkeys(seeds, statistics.fmean(of_base.values())) if of_base else {}
