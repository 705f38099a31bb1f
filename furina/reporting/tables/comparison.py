"""The table of a suite beside the paper's: each row's accuracy and how far it is from a reference.

What is bold is claimed: the best row, where its advantage over the reference is supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from furina.reporting.compare.paper import PaperColumns, is_removed
from furina.reporting.compare.rows import ALPHA, Finding, findings, reference_row, supported
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.scores import by_seed, macro, means_by_seed, served
from furina.reporting.read.statistics import FEWEST_PAIRS, RESAMPLES
from furina.reporting.read.suites import Results
from furina.reporting.tables.cells import Cell, Row, Table, build, interval, missing
from furina.reporting.tables.main import conditions, failure_remarks, row_head
from furina.reporting.tables.notes import NOT_ALL_TASKS, REFERENCE
from furina.reporting.tables.paper import paper_cells, rows_not_run
from furina.reporting.tables.scores import at_chance, run_notes, served_cell, spread_cell

NOT_PAIRED = "per-question outputs are missing, so there is no interval and no p"
FEW_PAIRS = f"fewer than {FEWEST_PAIRS} pairs of task and seed"


def comparison_table(
    suite: Results, paper: PaperTable | None = None, reference: str | None = None
) -> Table | None:
    """Return a line per row: accuracy, difference to a reference row, and the paper's of both.

    `reference` is by default that of `reference_row`. Rows of the paper that have no record are
    listed as not run. None where nothing was scored. Raises RecordError where the paper's table
    does not hold percentages, or two runs answered different questions.
    """
    if not any(by_seed(suite, row, task) for row in suite.rows for task in suite.tasks):
        return None
    reference = reference_row(suite, paper, reference)
    found = findings(suite, reference)
    columns = None if paper is None else PaperColumns.of(suite, paper, reference)
    best = supported(suite, reference, found)
    rows: list[Row] = []
    for row in suite.rows:
        finding = found.get(row)
        cells = _measured(suite, row, reference, finding, row in best)
        if columns is not None:
            theirs, gap = columns.paper.ours.get(row), finding.difference if finding else None
            cells.update(paper_cells(columns, theirs, macro(suite, row), gap, NOT_ALL_TASKS))
        rows.append(cells)
    if columns is not None:
        rows += rows_not_run(columns, suite, rows[0])
    title = f"{suite.name}: under protocol {suite.protocol}"
    title += f", compared with {reference}" if reference else ""
    title += f", beside the paper's {paper.place}" if paper else ""
    return build("comparison", title, rows, _remarks(suite, reference, columns))


def _measured(
    suite: Results, row: str, reference: str | None, finding: Finding | None, is_best: bool
) -> Row:
    cells, group, tasks = row_head(suite, row, suite), f"{suite.metric}, %", suite.tasks
    if len(tasks) > 1:
        mean = _mean_cell(suite, row)
        cells[group, f"mean of {len(tasks)} tasks"] = replace(mean, bold=is_best)
    for task in tasks:
        bold = is_best and len(tasks) == 1
        cells[group, task] = replace(served_cell(suite, row, task), bold=bold)
    if reference is not None:
        group = f"difference to {reference}, points"
        shown = _difference_cells(finding, REFERENCE if row == reference else NOT_ALL_TASKS)
        cells.update({(group, name): cell for name, cell in shown.items()})
    return cells


def _mean_cell(suite: Results, row: str) -> Cell:
    """Return a row's mean accuracy over the suite's tasks; the deviation is of the seeds' means."""
    mean = macro(suite, row)
    if mean is None:
        return missing(NOT_ALL_TASKS)
    seeds = means_by_seed([by_seed(suite, row, task) for task in suite.tasks])
    notes = [note for task in suite.tasks for note in run_notes(suite, row, task)]
    notes += at_chance(suite, row, served(suite, row))
    return spread_cell(mean, list(seeds.values()), notes)


def _difference_cells(finding: Finding | None, absent: str) -> Mapping[str, Cell]:
    names = ("ours", "p", "Wilcoxon's p")
    if finding is None:
        return dict.fromkeys(names, missing(absent))
    found, p = finding.comparison, missing(NOT_PAIRED)
    ends = found.interval if found else None
    difference = interval(finding.difference, ends, notes=[NOT_PAIRED] * (found is None))
    if found is not None and finding.p is not None:
        p = _p_cell(finding.p, {"uncorrected": found.p})
    signed = missing(FEW_PAIRS)
    if finding.signed is not None and finding.signed_p is not None:
        more = {"uncorrected": finding.signed, "pairs": finding.pairs}
        signed = _p_cell(finding.signed_p, more)
    return dict(zip(names, (difference, p, signed), strict=True))


def _p_cell(p: float, more: Mapping[str, float]) -> Cell:
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", {"": p, **more})


def _remarks(
    suite: Results, reference: str | None, columns: PaperColumns | None
) -> tuple[str, ...]:
    remarks = [
        "Accuracy: mean over seeds ± sample standard deviation (n − 1), of the merged model where "
        "a method merges, else of the unmerged one. In the mean of tasks each task counts the "
        "same, and ± is the deviation of the seeds' means."
    ]
    if reference is not None:
        remarks.append(
            f"Difference to {reference}: of the means over all tasks, with a 95 % interval from "
            f"{RESAMPLES} bootstrap resamples of the questions within each task, paired between "
            "the two rows, and of the training runs where there are two or more seeds; p from the "
            f"same resamples, so {2 / (RESAMPLES + 1):g} or more. Wilcoxon's p: signed-rank test "
            "over the pairs of task and seed. Both p are corrected for the number of rows (Holm), "
            f"the interval is not. Bold: the highest mean, where p is below {ALPHA} and both rows "
            "have two or more seeds."
        )
    if columns is not None:
        paper = columns.paper
        remarks.append(
            f"In the paper: {paper.title}, {paper.place} of {paper.source}, "
            f"as far as known; the column is {columns.name}. Backbone, data, prompts and hardware "
            "may be others than ours: differences to the same row compare better than levels."
        )
        remarks += [
            f"{theirs}: in the tables router_removed and pairs."
            for theirs in paper.rows
            if is_removed(suite, theirs)
        ]
    if suite.left_out:
        remarks.append(
            f"Not here but among what is forgotten, as no run was trained on them: "
            f"{', '.join(sorted(suite.left_out))}."
        )
    return (*remarks, conditions(suite), *failure_remarks(suite))
