"""The paper's numbers: its own tables, and its columns beside those of a suite."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from furina.reporting.compare.paper import PaperColumns, is_removed
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.suites import Results
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing, number
from furina.reporting.tables.notes import NOT_RUN, REFERENCE

NOT_IN_PAPER = "not in the paper's table"
UNKNOWN = "not known to us"
OURS = "ours − paper"
REMARK = (
    "From {source}, as far as known: for context only. Other backbones, tasks, data and hardware "
    "than in our tables, so no cell here compares with one there."
)


def paper_table(path: Path) -> Table:
    """Return one of the paper's tables; raises RecordError on a damaged file."""
    paper = PaperTable.read(path)
    rows: list[Row] = []
    for name in paper.rows:
        row: Row = {("", "method"): label(name)}
        for column, unit in paper.columns.items():
            typed = paper.typed.get((name, column))
            cell = missing(UNKNOWN) if typed is None else Cell(typed, {"": float(typed)})
            row["", f"{column}, {unit}"] = cell
        rows.append(row)
    remark = REMARK.format(source=paper.source)
    return build(f"paper_{paper.name}", f"In the paper: {paper.title}", rows, (remark,))


def paper_cells(
    columns: PaperColumns,
    theirs: str | None,
    ours: float | None,
    difference: float | None,
    absent: str,
) -> Row:
    """Return the cells of one of the paper's rows and of one of ours.

    `ours` and `difference` are our mean and its difference to the reference; `absent` says why
    they are None.
    """
    unknown, reference = UNKNOWN if theirs else NOT_IN_PAPER, columns.reference
    value, group = columns.value(theirs), f"in the paper: {columns.name}"
    cells: Row = {(group, "%"): number(value, ".1f", [unknown] * (value is None))}
    minus: Row = {(OURS, "%"): _minus(ours, value, absent, unknown)}
    if reference is not None:
        column, usual = f"difference to {reference}", columns.paper.ours.get(reference)
        unknown = unknown if usual else f"the paper's table has no row {reference}"
        if theirs is not None and theirs == usual:
            cells[group, column] = minus[OURS, column] = missing(REFERENCE)
        else:
            gap = columns.difference(theirs)
            cells[group, column] = number(gap, "+.1f", [unknown] * (gap is None))
            minus[OURS, column] = _minus(difference, gap, absent, unknown)
    return {**cells, **minus}


def _minus(ours: float | None, theirs: float | None, absent: str, unknown: str) -> Cell:
    if ours is None:
        return missing(absent)
    return missing(unknown) if theirs is None else number(ours - theirs, "+.1f")


def rows_not_run(
    columns: PaperColumns, suite: Results, heads: Iterable[tuple[str, str]]
) -> list[Row]:
    """Return a line with the columns `heads` for each of the paper's rows that the suite lacks.

    A mixture without its router is no row of ours: tables of their own have it.
    """
    rows = []
    for name, ours in columns.paper.rows.items():
        if ours not in suite.rows and not is_removed(suite, name):
            cells: Row = dict.fromkeys(heads, missing(NOT_RUN))
            cells["", "row"], cells["", "model"] = label(ours or name), label("not run")
            rows.append({**cells, **paper_cells(columns, name, None, None, NOT_RUN)})
    return rows
