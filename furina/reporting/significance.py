"""Is one row better than another? A paired bootstrap over questions and seeds, and Wilcoxon's test.

The quantity is the difference D of two rows' macro means: the mean over tasks of the mean over
seeds and questions. Two things would come out otherwise if all were done again, and both are
resampled:

* the questions, within each task: a question's difference is that of its means over seeds, so the
  two rows are paired by question;
* the training runs, where there are two or more seeds: by how much a run's share in D deviates from
  its mean over seeds. A run is one training, be it of one task or of a mixture. Runs of the two
  rows are paired by seed where both have the same seeds. Drawing n of n seeds would give (n − 1)/n
  of their variance, half of it for two seeds, so the deviations are widened by √(n/(n − 1)); and
  few runs tell their variance badly, so they are widened once more, by Student's 97.5th percentile
  over the normal one. What single answers add to a run's error counts among the questions too: the
  interval is rather too wide than too narrow.

One resample is D plus the error of each part, drawn with replacement. The interval is the 2.5th to
97.5th percentile of the resamples, p twice the smaller share of them on one side of 0. Where a row
has one seed its training runs cannot be resampled: p then speaks of models, not of methods.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from furina.reporting.accuracy import correctness, require_same, scores
from furina.reporting.standings import by_seed, served
from furina.reporting.suites import Run, Suite

RESAMPLES = 9999
BATCH = 1000
"""Resamples that are drawn at once, which bounds the memory."""
PERCENTILES = (2.5, 97.5)
FEWEST_PAIRS = 6
"""Below six pairs no outcome of Wilcoxon's test has p < 0.05."""
DIGITS = 12
"""Decimals that count: equal means of three seeds may differ in the last bits."""

Values = NDArray[np.float64]
Answers = dict[str, tuple[Run, dict[str, float]]]
"""By task, each question's correctness as a mean over seeds, and the first run it is from."""


@dataclass(frozen=True)
class Comparison:
    """By how many points one row's macro mean is above another's, its 95 % interval and p."""

    difference: float
    low: float
    high: float
    p: float


def comparisons(suite: Suite, reference: str) -> dict[str, Comparison]:
    """Compare each row with a reference: the models that stand for them, over all tasks.

    A row without per-question outputs of every task is left out. Raises RecordError where two runs
    answered different questions of a task.
    """
    theirs = _answers(suite, reference)
    found = {row: _answers(suite, row) for row in suite.rows if row != reference and theirs}
    return {
        row: compare(suite, row, reference, ours, theirs)
        for row, ours in found.items()
        if ours and theirs
    }


def _answers(suite: Suite, row: str) -> Answers | None:
    """Return a row's answers to every task, None where some are missing."""
    found: Answers = {}
    for task in suite.tasks:
        pairs = scores(suite, row, task, served(suite, row))
        correct = correctness(pairs) if pairs else None
        if correct is None:
            return None
        found[task] = pairs[0][0], correct
    return found


def compare(suite: Suite, row: str, reference: str, ours: Answers, theirs: Answers) -> Comparison:
    """Return by how much a row is above another, from the answers of both."""
    generator = np.random.default_rng(_seed(row, reference))
    questions = [_differences(ours[task], theirs[task]) / len(ours) for task in ours]
    return bootstrap([*questions, *run_parts(_run_shares(suite, row, reference))], generator)


def _differences(
    ours: tuple[Run, dict[str, float]], theirs: tuple[Run, dict[str, float]]
) -> Values:
    """Return the differences by question. Shape: (questions,)."""
    require_same(ours[1], theirs[1], (ours[0], theirs[0]), "paired")
    return np.array([ours[1][key] - theirs[1][key] for key in sorted(ours[1])])


def _run_shares(suite: Suite, row: str, reference: str) -> Iterator[list[float]]:
    """Yield the runs' shares in D of all that was trained, paired by seed where that can be."""
    ours, theirs = _shares(suite, row), _shares(suite, reference)
    for trained in {**ours, **theirs}:
        first, second = ours.get(trained, {}), theirs.get(trained, {})
        if first.keys() == second.keys():
            yield [first[seed] - second[seed] for seed in first]
        else:
            yield list(first.values())
            yield [-share for share in second.values()]


def _shares(suite: Suite, row: str) -> dict[str, dict[int, float]]:
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


def _seed(*names: str) -> int:
    """Return the generator's seed, which depends on the two rows' names alone."""
    return int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:8], "big")


def signed_rank(suite: Suite, row: str, reference: str) -> tuple[float | None, int]:
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
    corrected: dict[str, float] = {}
    largest = 0.0
    for i, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}
