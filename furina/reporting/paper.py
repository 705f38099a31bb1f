"""The paper's own numbers, typed once in results/paper/*.csv, shown apart from measured ones."""

from __future__ import annotations

import csv
from pathlib import Path

from furina.records import RecordError
from furina.reporting.cells import Cell, Row, Table, build, label, missing

HEADER = ["source", "table", "row", "column", "value", "unit"]
UNKNOWN = "not known to us"
REMARK = (
    "From {source}, as far as known: for context only. Other backbones, tasks, data and hardware "
    "than in our tables, so no cell here compares with one there."
)


def paper_table(path: Path) -> Table:
    """Return one of the paper's tables; raises RecordError on a damaged file."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        header, lines = reader.fieldnames, list(reader)
    if header != HEADER or not lines:
        raise RecordError(f"{path} must have lines under the header {','.join(HEADER)}.")
    values = {(line["row"], line["column"]): _cell(path, line) for line in lines}
    if len(values) < len(lines):
        raise RecordError(f"{path} gives one row and column twice; keep one of them.")
    columns = list(dict.fromkeys((line["column"], line["unit"]) for line in lines))
    rows: list[Row] = []
    for name in dict.fromkeys(line["row"] for line in lines):
        row: Row = {("", "method"): label(name)}
        for column, unit in columns:
            row["", f"{column}, {unit}"] = values.get((name, column), missing(UNKNOWN))
        rows.append(row)
    remark = REMARK.format(source=lines[0]["source"])
    return build(f"paper_{path.stem}", f"In the paper: {lines[0]['table']}", rows, (remark,))


def _cell(path: Path, line: dict[str, str]) -> Cell:
    try:
        return Cell(line["value"], {"": float(line["value"])})
    except ValueError as error:
        raise RecordError(f"{path}: {line['value']!r} is not a number.") from error
