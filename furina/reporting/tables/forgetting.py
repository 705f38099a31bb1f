"""What is forgotten: the relative drop of tasks that no run trained, a line per row."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from furina.reporting.compare.forgetting import General, general_tasks, mean_drop, mean_drops
from furina.reporting.compare.paper import PaperColumns
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.scores import scores
from furina.reporting.read.suites import Results
from furina.reporting.tables.cells import Cell, Row, Table, build, missing
from furina.reporting.tables.main import conditions, failure_remarks, row_head
from furina.reporting.tables.notes import NOT_ALL_TASKS, REFERENCE
from furina.reporting.tables.paper import paper_cells, rows_not_run
from furina.reporting.tables.scores import NO_BASE_SCORE, run_notes, served_cell, spread_cell

NOTHING_TO_LOSE = "the base model answers none of its questions, so there is nothing to lose"
AT_CHANCE = "the base model is not above chance, so there is little to lose"
DROP = "relative drop, %"
REMARK = (
    "Relative drop: 100·(base − tuned)/base of a task's accuracy, below 0 where tuning helps; "
    "mean over seeds ± sample standard deviation (n − 1). The mean over tasks counts each task "
    "the same."
)


def forgetting_table(suite: Results, paper: PaperTable | None = None) -> Table | None:
    """Return how much of each task that no run trained a row forgets, and the mean (table 6).

    Tasks of all protocols count, each with the first metric of its records; `paper` holds the
    paper's mean drops. None where all that is scored was trained.
    """
    generals = general_tasks(suite)
    if not generals:
        return None
    columns = None if paper is None else PaperColumns.of(suite, paper, None)
    rows = [_line(suite, row, generals, columns) for row in suite.rows]
    rows += [] if columns is None else rows_not_run(columns, suite, rows[0])
    title, remarks = f"{suite.name}: what is forgotten", [REMARK]
    if paper is not None:
        title += f", beside the paper's {paper.place}"
        remarks.append(f"In the paper: {paper.title}, {paper.place} of {paper.source}.")
    remarks += [conditions(suite), *failure_remarks(suite)]
    return build("forgetting", title, rows, tuple(remarks))


def _line(
    suite: Results, row: str, generals: Sequence[General], columns: PaperColumns | None
) -> Row:
    cells = row_head(suite, row, generals[0].suite)
    drops = {general: drop_cell(general, row) for general in generals}
    for general, cell in drops.items():
        shown = served_cell(general.suite, row, general.task)
        cells[general.group, f"{general.suite.metric}, %"] = shown
        cells[general.group, DROP] = cell
    mean = None if row == "base" else mean_drop(generals, row)
    group = f"mean of {len(generals)} tasks"
    if mean is None:
        cells[group, DROP] = missing(REFERENCE if row == "base" else NOT_ALL_TASKS)
    else:
        notes = [note for cell in drops.values() for note in cell.notes]
        cells[group, DROP] = spread_cell(mean, mean_drops(generals, row), notes)
    if columns is not None:
        theirs = columns.paper.ours.get(row)
        cells.update(paper_cells(columns, theirs, mean, None, NOT_ALL_TASKS))
    return cells


def drop_cell(general: General, row: str) -> Cell:
    """Return the mean drop over seeds; below 0 it is a gain."""
    if row == "base":
        return missing(REFERENCE)
    if not general.base:
        return missing(NO_BASE_SCORE if general.base is None else NOTHING_TO_LOSE)
    suite, task, drops = general.suite, general.task, list(general.drops(row).values())
    if not drops:
        return missing(*served_cell(suite, row, task).notes)
    at_chance = any(score.suspect for _, score in scores(suite, "base", task, "unmerged"))
    notes = [*run_notes(suite, row, task), *[AT_CHANCE] * at_chance]
    return spread_cell(statistics.fmean(drops), drops, notes)
