from __future__ import annotations

from furina.reporting.cells import Cell, Table


def rows_of(table: Table) -> list[dict[tuple[str, str], Cell]]:
    """Return a table's rows as cells by (group, column)."""
    columns = [(str(column[0]), str(column[1])) for column in table.frame.columns]
    return [dict(zip(columns, row, strict=True)) for row in table.frame.to_numpy().tolist()]
