"""What a row of a suite scored: by task, by seed, and question by question."""

from __future__ import annotations

import gzip
import json
import math
import statistics
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

from furina.records import RecordError, Score
from furina.reporting.read.statistics import Difference, of_pairs, of_scores
from furina.reporting.read.suites import Results, Run


def scores(suite: Results, row: str, task: str, variant: str) -> list[tuple[Run, Score]]:
    """Return the scores of a cell, one per seed; the base model's stand in for "unmerged"."""
    wanted = "base" if row == "base" and variant == "unmerged" else variant
    pairs = (
        (run, run.score(wanted, task, suite.protocol, suite.metric))
        for run in suite.select(row, task)
    )
    return [(run, score) for run, score in pairs if score]


def served(suite: Results, row: str) -> str:
    """Return the variant that stands for a row: merged where it merges, else unmerged."""
    taken = (score for run in suite.select(row) for score in run.record.evaluations)
    merges = any((s.variant, s.protocol) == ("merged", suite.protocol) for s in taken)
    return "merged" if merges else "unmerged"


def by_seed(suite: Results, row: str, task: str, variant: str | None = None) -> dict[int, float]:
    """Return a row's accuracy on a task by seed, in %, by default as it is served."""
    found = scores(suite, row, task, variant or served(suite, row))
    return {run.record.seed: 100 * score.value for run, score in found}


def macro(suite: Results, row: str, variant: str | None = None) -> float | None:
    """Return the mean over the suite's tasks of the mean over seeds, in %; None without a task."""
    found = [by_seed(suite, row, task, variant) for task in suite.tasks]
    return mean_of_means(found) if all(found) else None


def mean_of_means(found: Sequence[Mapping[int, float]]) -> float | None:
    """Return the mean over tasks of the means over seeds, None without tasks."""
    means = [statistics.fmean(seeds.values()) for seeds in found]
    return statistics.fmean(means) if means else None


def means_by_seed(found: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean over tasks of each seed that has them all."""
    whole = set.intersection(*map(set, found)) if found else set()
    return {seed: statistics.fmean(seeds[seed] for seeds in found) for seed in sorted(whole)}


def difference(
    suite: Results, task: str, ours: tuple[str, str], theirs: tuple[str, str]
) -> Difference | None:
    """Return by how much one (row, variant) beats another, as a fraction.

    It is paired over questions where outputs exist; with several seeds a question counts by its
    mean over seeds. None without both scores.
    """
    treated, control = (scores(suite, row, task, variant) for row, variant in (ours, theirs))
    if not treated or not control:
        return None
    questions = question_differences(suite, task, ours, theirs)
    if questions is not None:
        return of_pairs(questions)
    (value, error), (usual, usual_error) = (
        (statistics.fmean(s.value for _, s in side), statistics.fmean(s.stderr for _, s in side))
        for side in (treated, control)
    )
    return of_scores(value, error, usual, usual_error)


def gain(suite: Results, row: str, task: str, variant: str = "unmerged") -> Difference | None:
    """Return the gain over base as a fraction; see `difference`."""
    return difference(suite, task, (row, variant), ("base", "unmerged"))


def question_differences(
    suite: Results, task: str, ours: tuple[str, str], theirs: tuple[str, str]
) -> list[float] | None:
    """Return ours minus theirs by question; None unless both have per-question outputs.

    Raises RecordError where they answered different questions.
    """
    first, second = (correctness(suite, row, task, variant) for row, variant in (ours, theirs))
    if first is None or second is None:
        return None
    runs = [scores(suite, row, task, variant)[0][0] for row, variant in (ours, theirs)]
    _require_same(first, second, runs, "paired")
    return [first[key] - second[key] for key in sorted(first)]


@lru_cache(maxsize=256)  # a table, a figure and a status ask for the same outputs
def correctness(suite: Results, row: str, task: str, variant: str) -> Mapping[str, float] | None:
    """Return each question's mean correctness over the runs; None unless all have outputs.

    Raises RecordError where two runs answered different questions.
    """
    found = scores(suite, row, task, variant)
    known = [output for pair in found if (output := read_correct(*pair)) is not None]
    if not found or len(known) < len(found):
        return None
    for (run, _), output in zip(found, known, strict=True):
        _require_same(known[0], output, (found[0][0], run), "averaged")
    return {key: statistics.fmean(output[key] for output in known) for key in known[0]}


def _require_same(
    first: Mapping[str, float], second: Mapping[str, float], runs: Sequence[Run], what: str
) -> None:
    if first.keys() != second.keys():
        raise RecordError(
            f"The per-question outputs of {runs[0].path} and {runs[1].path} are of different "
            f"questions, so they cannot be {what}; run one of them again."
        )


def read_correct(run: Run, score: Score) -> dict[str, float] | None:
    """Return 1 or 0 per question id from a score's samples, None where there is no such file."""
    path = run.path.parent / score.samples if score.samples else None
    if path is None or not path.is_file():
        return None
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        correct = {str(row["id"]): float(row["correct"][score.metric]) for row in rows}
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise RecordError(
            f"{path} is not a file of per-question outputs ({error!r}); run {run.path} again."
        ) from error
    if not math.isclose(sum(correct.values()), score.value * score.n) or len(correct) != score.n:
        raise RecordError(f"{path} does not give the score in {run.path}; run its cell again.")
    return correct
