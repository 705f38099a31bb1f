"""Accuracy cells: scores over seeds, and the gain over the base model paired over questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from furina.records import RecordError, Score
from furina.reporting import differences
from furina.reporting.cells import Cell, missing
from furina.reporting.differences import Difference
from furina.reporting.notes import NO_RECORD, NO_RESULT, NOT_ALL_TASKS, ONE_MODEL
from furina.reporting.staleness import stale_notes
from furina.reporting.suites import Run, Suite, read_correct

NO_SCORE = "not scored in this variant"
NO_BASE_SCORE = "the base model was not scored on this task"
UNPAIRED = "unpaired: per-question outputs are missing, so the two standard errors are combined"


def scores(suite: Suite, row: str, task: str, variant: str) -> list[tuple[Run, Score]]:
    """Return the scores of a cell, one per seed; the base model's stand in for "unmerged"."""
    wanted = "base" if row == "base" and variant == "unmerged" else variant
    pairs = (
        (run, run.score(wanted, task, suite.protocol, suite.metric))
        for run in suite.select(row, task)
    )
    return [(run, score) for run, score in pairs if score]


def absence(suite: Suite, row: str, task: str, otherwise: str) -> str:
    """Return why a cell is empty: `otherwise` where its run succeeded."""
    if row == "base":
        return ONE_MODEL
    if suite.select(row, task):
        return otherwise
    failed = any(f.record.row == row and task in f.tasks(suite.protocol) for f in suite.failures)
    return NO_RESULT if failed else NO_RECORD


def accuracy(suite: Suite, row: str, task: str, variant: str) -> Cell:
    """Return the accuracy in percent with its standard error, as a mean over seeds."""
    pairs = scores(suite, row, task, variant)
    found = [score for _, score in pairs]
    if not found:
        base_missing = row == "base" and variant == "unmerged"
        reason = NO_RECORD if base_missing else absence(suite, row, task, NO_SCORE)
        return missing(reason)
    values = [100 * score.value for score in found]
    stderr = 100 * statistics.fmean(score.stderr for score in found)
    deviation = differences.stdev(values)
    text = f"{statistics.fmean(values):.1f} ± {stderr:.1f}"
    if deviation is not None:
        text += f" (sd {deviation:.1f}, {len(found)} seeds)"
    numbers = {
        "": statistics.fmean(values),
        "stderr": stderr,
        "sd over seeds": deviation,
        "seeds": len(found),
        "n": found[0].n,
    }
    return Cell(text, numbers, (*score_notes(found), *_old(suite, pairs)))


def macro(suite: Suite, row: str, variant: str) -> Cell:
    """Return the mean accuracy over the suite's tasks, each of which counts the same."""
    means, errors = [], []
    for task in suite.tasks:
        found = [score for _, score in scores(suite, row, task, variant)]
        if not found:
            return missing(ONE_MODEL if row == "base" else NOT_ALL_TASKS)
        means.append(100 * statistics.fmean(score.value for score in found))
        errors.append(100 * statistics.fmean(score.stderr for score in found))
    stderr = math.hypot(*errors) / len(errors)
    numbers = {"": statistics.fmean(means), "stderr": stderr, "tasks": len(means)}
    old = [note for task in suite.tasks for note in _old(suite, scores(suite, row, task, variant))]
    notes = (*at_chance(suite, row, variant), *dict.fromkeys(old))
    return Cell(f"{numbers['']:.1f} ± {stderr:.1f}", numbers, notes)


def at_chance(suite: Suite, row: str, variant: str) -> list[str]:
    """Return a note where some of the suite's tasks say nothing about a row's model."""
    tasks = [
        task
        for task in suite.tasks
        if any(score.suspect for _, score in scores(suite, row, task, variant))
    ]
    return [f"not above chance on {', '.join(tasks)}"] if tasks else []


def _old(suite: Suite, pairs: Sequence[tuple[Run, Score]]) -> tuple[str, ...]:
    """Return what has changed since the scores were taken, once each."""
    notes = (note for run, _ in pairs for note in stale_notes(run.record, suite.changes))
    return tuple(dict.fromkeys(notes))


def score_notes(found: Sequence[Score]) -> tuple[str, ...]:
    """Return the notes of a cell's scores: not above chance, cut prompts."""
    return (*_chance_notes(found), *_truncation_notes(found))


def _chance_notes(found: Sequence[Score]) -> tuple[str, ...]:
    suspects = sum(score.suspect for score in found)
    if not suspects:
        return ()
    which = "" if suspects == len(found) else f" in {suspects} of {len(found)} seeds"
    return (
        f"not more than two standard errors above chance ({100 * found[0].chance:.1f} %){which}",
    )


def _truncation_notes(found: Sequence[Score]) -> tuple[str, ...]:
    cut = max(score.truncated for score in found)
    return (f"{cut} prompts were longer than the model reads and lost their start",) if cut else ()


def gain(suite: Suite, row: str, task: str, variant: str = "unmerged") -> Difference | None:
    """Return the gain over base as a fraction; see `difference`."""
    return difference(suite, task, (row, variant), ("base", "unmerged"))


def difference(
    suite: Suite, task: str, ours: tuple[str, str], theirs: tuple[str, str]
) -> Difference | None:
    """Return by how much one (row, variant) beats another, as a fraction.

    It is paired over questions where outputs exist; with several seeds a question counts by its
    mean over seeds. None without both scores.
    """
    treated, control = (scores(suite, row, task, way) for row, way in (ours, theirs))
    if not treated or not control:
        return None
    first_correct, second_correct = correctness(treated), correctness(control)
    if first_correct is None or second_correct is None:
        first, second = (_mean_score(pairs) for pairs in (treated, control))
        return differences.of_scores(*first, *second)
    require_same(first_correct, second_correct, (treated[0][0], control[0][0]), "paired")
    return differences.paired(first_correct, second_correct)


def _mean_score(pairs: Sequence[tuple[Run, Score]]) -> tuple[float, float]:
    value = statistics.fmean(score.value for _, score in pairs)
    return value, statistics.fmean(score.stderr for _, score in pairs)


def correctness(pairs: Sequence[tuple[Run, Score]]) -> dict[str, float] | None:
    """Return each question's mean correctness over the runs, None if one has no outputs.

    Raises RecordError where two runs answered different questions.
    """
    outputs = [read_correct(run, score) for run, score in pairs]
    known = [output for output in outputs if output is not None]
    if len(known) < len(outputs):
        return None
    for (run, _), output in zip(pairs, known, strict=True):
        require_same(known[0], output, (pairs[0][0], run), "averaged")
    return {key: statistics.fmean(output[key] for output in known) for key in known[0]}


def require_same(
    first: Mapping[str, float], second: Mapping[str, float], runs: tuple[Run, Run], what: str
) -> None:
    """Refuse outputs of different questions; raises RecordError naming the two runs' files."""
    if first.keys() != second.keys():
        raise RecordError(
            f"The per-question outputs of {runs[0].path} and {runs[1].path} are of different "
            f"questions, so they cannot be {what}; run one of them again."
        )


def gain_cell(suite: Suite, row: str, task: str, variant: str = "unmerged") -> Cell:
    """Return the gain over base in points and in standard errors."""
    if row == "base":
        return missing(ONE_MODEL)
    pairs = scores(suite, row, task, variant)
    if not pairs:
        return missing(absence(suite, row, task, NO_SCORE))
    difference = gain(suite, row, task, variant)
    if difference is None:
        return missing(NO_BASE_SCORE)
    points = f"{100 * difference.value:+.1f}"
    text = points if difference.z is None else f"{points} ({difference.z:+.1f} s.e.)"
    stderr = None if difference.stderr is None else 100 * difference.stderr
    numbers = {"": 100 * difference.value, "stderr": stderr, "in stderr": difference.z}
    how = () if difference.paired else (UNPAIRED,)
    return Cell(text, numbers, (*how, *_old(suite, pairs)))
