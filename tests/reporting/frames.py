from __future__ import annotations

from pathlib import Path

from furina.reporting.cells import Cell, Table
from furina.reporting.suites import Suite, load_suites


def load_suite(folder: Path, metric: str | None = None) -> Suite:
    """Return the suite of a folder that was scored under one protocol."""
    (suite,) = load_suites(folder, metric)
    return suite


def rows_of(table: Table) -> list[dict[tuple[str, str], Cell]]:
    """Return a table's rows as cells by (group, column)."""
    columns = [(str(column[0]), str(column[1])) for column in table.frame.columns]
    return [dict(zip(columns, row, strict=True)) for row in table.frame.to_numpy().tolist()]
