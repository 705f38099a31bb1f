"""The table of a suite beside the paper's: each row's accuracy and how far it is from a reference.

What is bold is claimed: the best row, where its advantage over the reference is supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from furina.reporting.beside import Beside
from furina.reporting.cells import Cell, Row, Table, build, label, missing
from furina.reporting.findings import LEVEL, Finding, findings, supported
from furina.reporting.notes import NOT_ALL_TASKS, REFERENCE
from furina.reporting.paper import PaperTable
from furina.reporting.removal import is_removed
from furina.reporting.seeded import mean_cell, task_cell
from furina.reporting.significance import FEWEST_PAIRS, RESAMPLES
from furina.reporting.standings import by_seed, macro, reference_row, served
from furina.reporting.suites import Suite
from furina.reporting.tables import conditions, failure_remarks, seeds_cell

NOT_PAIRED = "per-question outputs are missing, so there is no interval and no p"
FEW_PAIRS = f"fewer than {FEWEST_PAIRS} pairs of task and seed"


def comparison_table(
    suite: Suite, paper: PaperTable | None = None, reference: str | None = None
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
    beside = None if paper is None else Beside.of(suite, paper, reference)
    best = supported(suite, reference, found)
    rows: list[Row] = []
    for row in suite.rows:
        cells = _measured(suite, row, reference, found.get(row), row in best)
        if beside is not None:
            cells.update(_paper_cells(suite, row, beside, found.get(row)))
        rows.append(cells)
    if beside is not None:
        rows += beside.not_run(suite, rows[0])
    title = f"{suite.name}: under protocol {suite.protocol}"
    title += f", compared with {reference}" if reference else ""
    title += f", beside the paper's {paper.place}" if paper else ""
    return build("comparison", title, rows, _remarks(suite, reference, beside))


def _measured(
    suite: Suite, row: str, reference: str | None, finding: Finding | None, is_best: bool
) -> Row:
    cells: Row = {
        ("", "row"): label(row),
        ("", "model"): label("base" if row == "base" else served(suite, row)),
        ("", "seeds"): seeds_cell(row, suite.select(row)),
    }
    group, tasks = f"{suite.metric}, %", suite.tasks
    if len(tasks) > 1:
        cells[group, f"mean of {len(tasks)} tasks"] = replace(mean_cell(suite, row), bold=is_best)
    for task in tasks:
        bold = is_best and len(tasks) == 1
        cells[group, task] = replace(task_cell(suite, row, task), bold=bold)
    if reference is not None:
        group = f"difference to {reference}, points"
        shown = _difference_cells(finding, REFERENCE if row == reference else NOT_ALL_TASKS)
        cells.update({(group, name): cell for name, cell in shown.items()})
    return cells


def _difference_cells(finding: Finding | None, absent: str) -> Mapping[str, Cell]:
    names = ("ours", "p", "Wilcoxon's p")
    if finding is None:
        return dict.fromkeys(names, missing(absent))
    text, found = f"{finding.difference:+.1f}", finding.comparison
    if found is None or finding.p is None:
        difference = Cell(text, {"": finding.difference}, (NOT_PAIRED,))
        p = missing(NOT_PAIRED)
    else:
        numbers = {"": finding.difference, "low": found.low, "high": found.high}
        difference = Cell(f"{text} [{found.low:+.1f}, {found.high:+.1f}]", numbers)
        p = _p_cell(finding.p, {"uncorrected": found.p})
    signed = missing(FEW_PAIRS)
    if finding.signed is not None and finding.signed_p is not None:
        more = {"uncorrected": finding.signed, "pairs": finding.pairs}
        signed = _p_cell(finding.signed_p, more)
    return dict(zip(names, (difference, p, signed), strict=True))


def _p_cell(p: float, more: Mapping[str, float]) -> Cell:
    return Cell("< 0.001" if p < 0.001 else f"{p:.3f}", {"": p, **more})


def _paper_cells(suite: Suite, row: str, beside: Beside, finding: Finding | None) -> Row:
    difference = finding.difference if finding else None
    theirs = beside.paper.ours.get(row)
    return beside.cells(theirs, macro(suite, row), difference, NOT_ALL_TASKS)


def _remarks(suite: Suite, reference: str | None, beside: Beside | None) -> tuple[str, ...]:
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
            f"the interval is not. Bold: the highest mean, where p is below {LEVEL} and both rows "
            "have two or more seeds."
        )
    if beside is not None:
        remarks.append(
            f"In the paper: {beside.paper.title}, {beside.paper.place} of {beside.paper.source}, "
            f"as far as known; the column is {beside.column}. Backbone, data, prompts and hardware "
            "may be others than ours: differences to the same row compare better than levels."
        )
        remarks += [
            f"{theirs}: in the tables router_removed and pairs."
            for theirs in beside.paper.rows
            if is_removed(suite, theirs)
        ]
    if suite.left_out:
        remarks.append(
            f"Not here but among what is forgotten, as no run was trained on them: "
            f"{', '.join(sorted(suite.left_out))}."
        )
    return (*remarks, conditions(suite), *failure_remarks(suite))
