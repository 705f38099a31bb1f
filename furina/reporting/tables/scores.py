"""Cells of accuracies: means with their spread, gains over base, and what speaks against them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from furina.records import Score
from furina.reporting.read.scores import by_seed, gain, macro, scores, served
from furina.reporting.read.statistics import stdev
from furina.reporting.read.suites import Results
from furina.reporting.tables.cells import Cell, missing
from furina.reporting.tables.notes import FEW_SEEDS, NO_RECORD, NO_RESULT, NOT_ALL_TASKS, ONE_MODEL

NO_SCORE = "not scored in this variant"
NO_BASE_SCORE = "the base model was not scored on this task"
UNPAIRED = "unpaired: per-question outputs are missing, so the two standard errors are combined"


def absence(suite: Results, row: str, task: str, otherwise: str = NO_SCORE) -> str:
    """Return why a cell is empty: `otherwise` where its run succeeded."""
    if row == "base":
        return ONE_MODEL
    if suite.select(row, task):
        return otherwise
    return NO_RESULT if suite.failed(row, task) else NO_RECORD


def accuracy(suite: Results, row: str, task: str, variant: str) -> Cell:
    """Return the accuracy in percent with its standard error, as a mean over seeds."""
    pairs = scores(suite, row, task, variant)
    found = [score for _, score in pairs]
    if not found:
        base_missing = row == "base" and variant == "unmerged"
        return missing(NO_RECORD if base_missing else absence(suite, row, task))
    values = [100 * score.value for score in found]
    mean, stderr, deviation = statistics.fmean(values), _stderr(found), stdev(values)
    text = f"{mean:.1f} ± {stderr:.1f}"
    if deviation is not None:
        text += f" (sd {deviation:.1f}, {len(found)} seeds)"
    numbers = {
        "": mean,
        "stderr": stderr,
        "sd over seeds": deviation,
        "seeds": len(found),
        "n": found[0].n,
    }
    return Cell(text, numbers, [*score_notes(found), *suite.stale_notes(run for run, _ in pairs)])


def macro_cell(suite: Results, row: str, variant: str) -> Cell:
    """Return the mean accuracy over the suite's tasks, each of which counts the same."""
    mean = macro(suite, row, variant)
    if mean is None:
        return missing(ONE_MODEL if row == "base" else NOT_ALL_TASKS)
    pairs = [scores(suite, row, task, variant) for task in suite.tasks]
    errors = [_stderr([score for _, score in found]) for found in pairs]
    stderr = math.hypot(*errors) / len(errors)
    old = suite.stale_notes(run for found in pairs for run, _ in found)
    notes = [*at_chance(suite, row, variant), *old]
    numbers = {"": mean, "stderr": stderr, "tasks": len(errors)}
    return Cell(f"{mean:.1f} ± {stderr:.1f}", numbers, notes)


def gain_cell(suite: Results, row: str, task: str, variant: str = "unmerged") -> Cell:
    """Return the gain over base in points and in standard errors."""
    pairs = scores(suite, row, task, variant)
    if row == "base" or not pairs:
        return missing(absence(suite, row, task))
    found = gain(suite, row, task, variant)
    if found is None:
        return missing(NO_BASE_SCORE)
    points = f"{100 * found.value:+.1f}"
    text = points if found.z is None else f"{points} ({found.z:+.1f} s.e.)"
    stderr = None if found.stderr is None else 100 * found.stderr
    numbers = {"": 100 * found.value, "stderr": stderr, "in stderr": found.z}
    notes = [UNPAIRED] * (not found.paired) + suite.stale_notes(run for run, _ in pairs)
    return Cell(text, numbers, notes)


def served_cell(suite: Results, row: str, task: str) -> Cell:
    """Return the accuracy in percent of what a row is served as, with its spread over seeds."""
    found = [score for _, score in scores(suite, row, task, served(suite, row))]
    if not found:
        return missing(NO_RECORD if row == "base" else absence(suite, row, task))
    values = list(by_seed(suite, row, task).values())
    notes = [*run_notes(suite, row, task), *score_notes(found)]
    return spread_cell(statistics.fmean(values), values, notes)


def spread_cell(mean: float, seeds: Sequence[float], notes: Sequence[str]) -> Cell:
    """Return a mean with the sample standard deviation over seeds, where there are two."""
    deviation = stdev(seeds)
    text = f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
    return Cell(text, {"": mean, "sd over seeds": deviation, "seeds": len(seeds)}, notes)


def run_notes(suite: Results, row: str, task: str) -> list[str]:
    """Return what speaks against the runs of a cell: few seeds, runs left out, old code."""
    runs = [run for run, _ in scores(suite, row, task, served(suite, row))]
    notes = list(FEW_SEEDS.get(len(runs), ())) if row != "base" else []
    if lost := len(suite.failed(row, task)):
        whole = lost + len(runs)
        notes.append(f"without {lost} of {whole} runs, which diverged or failed, see below")
    return notes + suite.stale_notes(runs)


def at_chance(suite: Results, row: str, variant: str) -> list[str]:
    """Return a note where some of the suite's tasks say nothing about a row's model."""
    tasks = [
        task
        for task in suite.tasks
        if any(score.suspect for _, score in scores(suite, row, task, variant))
    ]
    return [f"not above chance on {', '.join(tasks)}"] if tasks else []


def score_notes(found: Sequence[Score]) -> list[str]:
    """Return what speaks against a cell's scores: not above chance, cut prompts."""
    notes = []
    if suspects := sum(score.suspect for score in found):
        which = "" if suspects == len(found) else f" in {suspects} of {len(found)} seeds"
        chance = f"{100 * found[0].chance:.1f} %"
        notes.append(f"not more than two standard errors above chance ({chance}){which}")
    if cut := max(score.truncated for score in found):
        notes.append(f"{cut} prompts were longer than the model reads and lost their start")
    return notes


def _stderr(found: Sequence[Score]) -> float:
    return 100 * statistics.fmean(score.stderr for score in found)
