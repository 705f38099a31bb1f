"""What tuning on one task takes from others: the relative drop of tasks that no run trained."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from furina.reporting.accuracy import NO_BASE_SCORE, scores
from furina.reporting.beside import Beside
from furina.reporting.cells import Cell, Row, Table, build, label, missing
from furina.reporting.notes import NOT_ALL_TASKS, REFERENCE
from furina.reporting.paper import PaperTable
from furina.reporting.seeded import run_notes, spread_cell, task_cell
from furina.reporting.standings import by_seed, served
from furina.reporting.suites import Suite
from furina.reporting.tables import conditions, failure_remarks, seeds_cell

NOTHING_TO_LOSE = "the base model answers none of its questions, so there is nothing to lose"
AT_CHANCE = "the base model is not above chance, so there is little to lose"
DROP = "relative drop, %"
Drops = dict[int, float]
"""A relative drop by seed, in %."""


@dataclass(frozen=True)
class General:
    """A task that no run trained, seen as a suite of its protocol and main metric."""

    suite: Suite
    task: str

    @property
    def group(self) -> str:
        """Return the heading of its columns."""
        return f"{self.task}, {self.suite.protocol}"

    @property
    def base(self) -> float | None:
        """Return the base model's accuracy in %, None where it was not scored."""
        values = by_seed(self.suite, "base", self.task).values()
        return statistics.fmean(values) if values else None

    def drops(self, row: str) -> Drops:
        """Return 100·(base − tuned)/base by seed; empty where one of them is missing or 0."""
        if not self.base:
            return {}
        tuned = by_seed(self.suite, row, self.task)
        return {seed: 100 * (self.base - value) / self.base for seed, value in tuned.items()}

    def drop_cell(self, row: str) -> Cell:
        """Return the mean drop over seeds; below 0 it is a gain."""
        if row == "base":
            return missing(REFERENCE)
        if not self.base:
            return missing(NO_BASE_SCORE if self.base is None else NOTHING_TO_LOSE)
        drops = self.drops(row)
        if not drops:
            return missing(*task_cell(self.suite, row, self.task).notes)
        base = scores(self.suite, "base", self.task, "unmerged")
        at_chance = any(score.suspect for _, score in base)
        notes = [*run_notes(self.suite, row, self.task), *[AT_CHANCE] * at_chance]
        return spread_cell(statistics.fmean(drops.values()), list(drops.values()), notes)


def forgetting_table(suite: Suite, paper: PaperTable | None = None) -> Table | None:
    """Return how much of each task that no run trained a row forgets, and the mean (table 6).

    Tasks of all protocols count, each with the first metric of its records; `paper` holds the
    paper's mean drops. None where all that is scored was trained.
    """
    generals = general_tasks(suite)
    if not generals:
        return None
    beside = None if paper is None else Beside.of(suite, paper, None)
    rows = [_line(suite, row, generals, beside) for row in suite.rows]
    rows += [] if beside is None else beside.not_run(suite, rows[0])
    remarks = [
        "Relative drop: 100·(base − tuned)/base of a task's accuracy, below 0 where tuning helps; "
        "mean over seeds ± sample standard deviation (n − 1). The mean over tasks counts each task "
        "the same.",
    ]
    if paper is not None:
        remarks.append(f"In the paper: {paper.title}, {paper.place} of {paper.source}.")
    remarks += [conditions(suite), *failure_remarks(suite)]
    title = f"{suite.name}: what is forgotten"
    title += f", beside the paper's {paper.place}" if paper else ""
    return build("forgetting", title, rows, tuple(remarks))


def general_tasks(suite: Suite) -> list[General]:
    """Return the tasks that were scored and that no run trained, of every protocol."""
    taught = suite.taught
    metrics: dict[tuple[str, str], str] = {}
    for run in suite.runs:
        for score in run.record.evaluations:
            if score.task not in taught:
                metrics.setdefault((score.task, score.protocol), score.metric)
    return [
        General(replace(suite, protocol=protocol, metric=metric), task)
        for (task, protocol), metric in sorted(metrics.items())
    ]


def _line(suite: Suite, row: str, generals: list[General], beside: Beside | None) -> Row:
    cells: Row = {
        ("", "row"): label(row),
        ("", "model"): label("base" if row == "base" else served(generals[0].suite, row)),
        ("", "seeds"): seeds_cell(row, suite.select(row)),
    }
    for general in generals:
        cells[general.group, f"{general.suite.metric}, %"] = task_cell(
            general.suite, row, general.task
        )
        cells[general.group, DROP] = general.drop_cell(row)
    mean = _mean_cell(row, generals)
    cells[f"mean of {len(generals)} tasks", DROP] = mean
    if beside is not None:
        ours = mean.numbers[""]
        value = ours if isinstance(ours, float) else None
        cells.update(beside.cells(beside.paper.ours.get(row), value, None, NOT_ALL_TASKS))
    return cells


def _mean_cell(row: str, generals: list[General]) -> Cell:
    if row == "base":
        return missing(REFERENCE)
    drops = [general.drops(row) for general in generals]
    if not all(drops):
        return missing(NOT_ALL_TASKS)
    mean = statistics.fmean(statistics.fmean(found.values()) for found in drops)
    whole = sorted(set.intersection(*map(set, drops)))
    seeds = [statistics.fmean(found[seed] for found in drops) for seed in whole]
    notes = [note for general in generals for note in general.drop_cell(row).notes]
    return spread_cell(mean, seeds, notes)
