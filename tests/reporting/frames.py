from __future__ import annotations

from pathlib import Path

from furina.reporting.read.suites import Results, load_suites
from furina.reporting.tables.cells import Cell, Table


def load_suite(folder: Path, metric: str | None = None) -> Results:
    """Return the suite of a folder that was scored under one protocol."""
    (suite,) = load_suites(folder, metric)
    return suite


def rows_of(table: Table) -> list[dict[tuple[str, str], Cell]]:
    """Return a table's rows as cells by (group, column)."""
    columns = [(str(column[0]), str(column[1])) for column in table.frame.columns]
    return [dict(zip(columns, row, strict=True)) for row in table.frame.to_numpy().tolist()]
