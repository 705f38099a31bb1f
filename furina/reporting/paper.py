"""The paper's own numbers, typed once in results/paper/*.csv, shown apart from measured ones."""

from __future__ import annotations

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from furina.records import RecordError
from furina.reporting.cells import Cell, Row, Table, build, label, missing
from furina.reporting.typed import read_lines

HEADER = ["source", "table", "row", "column", "value", "unit", "place", "ours"]
UNKNOWN = "not known to us"
REMARK = (
    "From {source}, as far as known: for context only. Other backbones, tasks, data and hardware "
    "than in our tables, so no cell here compares with one there."
)


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables or figures, as far as its numbers are known.

    `place` is where it stands in the paper, `columns` maps each column to its unit, `rows` each of
    the paper's rows to the row of our suite that it corresponds to ("" without one), and `typed`
    holds the numbers as they were typed, by (row, column).
    """

    name: str
    source: str
    title: str
    place: str
    columns: dict[str, str]
    rows: dict[str, str]
    typed: dict[tuple[str, str], str]

    @classmethod
    def read(cls, path: Path) -> PaperTable:
        """Read one file; raises RecordError on a damaged one."""
        lines = read_lines(path, HEADER)
        typed = {(line["row"], line["column"]): _checked(path, line["value"]) for line in lines}
        if len(typed) < len(lines):
            raise RecordError(f"{path} gives one row and column twice; keep one of them.")
        rows = _one_each(path, lines, "row", "ours")
        ours = [name for name in rows.values() if name]
        if len(set(ours)) < len(ours):
            raise RecordError(f"{path}: two of the paper's rows cannot be one of ours.")
        for key in ("source", "table", "place"):
            if len({line[key] for line in lines}) > 1 or not lines[0][key]:
                raise RecordError(f"{path} must have the same {key} on every line.")
        first = lines[0]
        columns = _one_each(path, lines, "column", "unit")
        return cls(path.stem, first["source"], first["table"], first["place"], columns, rows, typed)

    @property
    def ours(self) -> dict[str, str]:
        """Return the paper's row by the row of our suite."""
        return {ours: row for row, ours in self.rows.items() if ours}

    def columns_for(self, backbone: str) -> tuple[str, ...]:
        """Return the column of a backbone; else the paper's own mean; else all its columns.

        A column is of a backbone whose name has all its parts: OpenChat-8B is
        openchat/openchat-3.6-8b-20240522.
        """
        own = [column for column in self.columns if _parts(column) <= _parts(backbone)]
        means = [column for column in self.columns if column.startswith("mean")]
        return tuple(own or means or self.columns)

    def value(self, row: str, columns: tuple[str, ...]) -> float | None:
        """Return the mean of one of the paper's rows over columns, None unless all are known."""
        known = [self.typed[row, column] for column in columns if (row, column) in self.typed]
        return statistics.fmean(map(float, known)) if len(known) == len(columns) else None


def paper_table(path: Path) -> Table:
    """Return one of the paper's tables; raises RecordError on a damaged file."""
    paper = PaperTable.read(path)
    rows: list[Row] = []
    for name in paper.rows:
        row: Row = {("", "method"): label(name)}
        for column, unit in paper.columns.items():
            row["", f"{column}, {unit}"] = _cell(paper.typed.get((name, column)))
        rows.append(row)
    remark = REMARK.format(source=paper.source)
    return build(f"paper_{paper.name}", f"In the paper: {paper.title}", rows, (remark,))


def _cell(typed: str | None) -> Cell:
    return missing(UNKNOWN) if typed is None else Cell(typed, {"": float(typed)})


def _checked(path: Path, value: str) -> str:
    if not re.fullmatch(r"-?\d+(\.\d+)?", value):
        raise RecordError(f"{path}: {value!r} is not a number.")
    return value


def _one_each(path: Path, lines: list[dict[str, str]], key: str, other: str) -> dict[str, str]:
    """Return each value of a column with that of another, which is one and the same everywhere."""
    found: dict[str, str] = {}
    for line in lines:
        if found.setdefault(line[key], line[other]) != line[other]:
            raise RecordError(f"{path}: the {key} {line[key]!r} must always have the same {other}.")
    return found


def _parts(name: str) -> set[str]:
    """Return the parts of a model's name, such as qwen2 and 7b, without its owner and case."""
    return set(re.split(r"[-_ ]", name.rpartition("/")[2].lower()))
