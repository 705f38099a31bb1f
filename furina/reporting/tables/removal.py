"""What is left of a method once it is one matrix per linear: merged, or with its router removed."""

from __future__ import annotations

from furina.reporting.compare.paper import REMOVED
from furina.reporting.read.scores import difference, scores
from furina.reporting.read.statistics import Difference
from furina.reporting.read.suites import Results
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing, number
from furina.reporting.tables.scores import accuracy

NOT_PAIRED = "per-question outputs are missing, so there is no interval"


def removal_table(suite: Results) -> Table | None:
    """Return a line per row and task, None where no router was removed (the paper's table 7)."""
    found = [
        (row, task)
        for row in suite.rows
        for task in suite.tasks
        if row == "base" or _served(suite, row, task)
    ]
    if not any(_served(suite, *pair) == REMOVED for pair in found):
        return None
    rows = [_cells(suite, *pair) for pair in found]
    remarks = (
        "As trained: with its router, or unmerged. As one matrix: the plain average of the experts "
        "where a router was removed, else merged. Difference: as one matrix minus as trained, in "
        "points, paired over questions, with a 95 % interval from its standard error.",
        "Verdict: no difference where that interval holds 0; below it a method collapses if what "
        "is left is not above the base model by more than 1.96 standard errors, and drops if it "
        "is.",
    )
    return build("router_removed", f"{suite.name}: routers removed", rows, remarks, keys=2)


def _served(suite: Results, row: str, task: str) -> str | None:
    """Return the variant that is one matrix per linear, None if there is none."""
    return next((v for v in (REMOVED, "merged") if scores(suite, row, task, v)), None)


def _cells(suite: Results, row: str, task: str) -> Row:
    cells: Row = {("", "method"): label(row), ("", "task"): label(task)}
    group = f"{suite.metric}, %"
    cells[group, "as trained"] = accuracy(suite, row, task, "unmerged")
    served = _served(suite, row, task)
    if served is None:
        blank = missing("the base model has no adapter")
        cells[group, "as one matrix"] = cells["difference", "points"] = blank
        cells["difference", "95 % interval"] = cells["", "verdict"] = blank
        cells["", "how"] = blank
        return cells
    cells[group, "as one matrix"] = accuracy(suite, row, task, served)
    lost = difference(suite, task, (row, served), (row, "unmerged"))
    left = difference(suite, task, (row, served), ("base", "unmerged"))
    assert lost is not None
    cells["difference", "points"] = number(100 * lost.value, "+.1f")
    cells["difference", "95 % interval"] = _interval_cell(lost)
    cells["", "verdict"] = label(verdict(lost, left))
    cells["", "how"] = label("router removed" if served == REMOVED else "merged")
    return cells


def _interval_cell(found: Difference) -> Cell:
    if found.interval is None:
        return missing(NOT_PAIRED)
    low, high = (100 * end for end in found.interval)
    return Cell(f"{low:+.1f} to {high:+.1f}", {"low": low, "high": high})


def verdict(lost: Difference, left: Difference | None) -> str:
    """Return what became of a method, from its loss and from what is left above the base."""
    if lost.interval is None:
        return "unknown"
    low, high = lost.interval
    if low <= 0 <= high:
        return "no difference"
    if low > 0:
        return "gains"
    above = None if left is None else left.interval
    if above is None:
        return "drops"
    return "drops" if above[0] > 0 else "collapses"
