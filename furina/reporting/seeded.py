"""Accuracy as mean ± deviation over seeds, with everything that speaks against a number."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from furina.reporting import differences
from furina.reporting.accuracy import NO_SCORE, absence, at_chance, score_notes, scores
from furina.reporting.cells import Cell, missing
from furina.reporting.notes import FEW_SEEDS, NO_RECORD, NOT_ALL_TASKS
from furina.reporting.staleness import stale_notes
from furina.reporting.standings import by_seed, macro, macro_by_seed, served
from furina.reporting.suites import Suite


def task_cell(suite: Suite, row: str, task: str) -> Cell:
    """Return a row's accuracy on one task, in %."""
    found = [score for _, score in scores(suite, row, task, served(suite, row))]
    if not found:
        return missing(NO_RECORD if row == "base" else absence(suite, row, task, NO_SCORE))
    values = list(by_seed(suite, row, task).values())
    notes = [*run_notes(suite, row, task), *score_notes(found)]
    return spread_cell(statistics.fmean(values), values, notes)


def mean_cell(suite: Suite, row: str) -> Cell:
    """Return a row's mean accuracy over the suite's tasks; the deviation is of the seeds' means."""
    mean = macro(suite, row)
    if mean is None:
        return missing(NOT_ALL_TASKS)
    notes = [note for task in suite.tasks for note in run_notes(suite, row, task)]
    notes += at_chance(suite, row, served(suite, row))
    return spread_cell(mean, list(macro_by_seed(suite, row).values()), notes)


def run_notes(suite: Suite, row: str, task: str) -> list[str]:
    """Return what speaks against the runs of a cell: few seeds, runs left out, old code."""
    runs = [run for run, _ in scores(suite, row, task, served(suite, row))]
    lost = [f for f in suite.failures if f.record.row == row and task in f.tasks(suite.protocol)]
    notes = list(FEW_SEEDS.get(len(runs), ())) if row != "base" else []
    if lost:
        all_runs = len(lost) + len(runs)
        notes.append(f"without {len(lost)} of {all_runs} runs, which diverged or failed, see below")
    return notes + [note for run in runs for note in stale_notes(run.record, suite.changes)]


def spread_cell(mean: float, seeds: Sequence[float], notes: Sequence[str]) -> Cell:
    """Return a mean with the sample standard deviation over seeds, where there are two."""
    deviation = differences.stdev(seeds)
    text = f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"
    numbers = {"": mean, "sd over seeds": deviation, "seeds": len(seeds)}
    return Cell(text, numbers, tuple(dict.fromkeys(notes)))
