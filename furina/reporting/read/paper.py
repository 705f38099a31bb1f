"""The paper's numbers as typed in results/paper: its tables and figures, and what repeats them."""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from furina.errors import nearest
from furina.records import RecordError

INDEX = "index.csv"
INDEX_HEADER = ["place", "title", "suite", "numbers", "file", "measure"]
HEADER = ["source", "table", "row", "column", "value", "unit", "place", "ours"]
Measure = Literal["accuracy", "removal", "drop", "time"]
"""What a table of the paper measures: accuracy, also without routers; a relative drop; times."""
ALLOWED = {
    "numbers": ("all", "partly", "approximately", "none"),
    "measure": ("", *get_args(Measure)),
}


@dataclass(frozen=True)
class Exhibit:
    """A table or figure of the paper, the suite that repeats it, and which numbers we know.

    `file` is the stem of the file that holds those, and `measure` says what they are; both are ""
    where none is known.
    """

    place: str
    title: str
    suite: str
    numbers: str
    file: str
    measure: Measure | Literal[""]

    def scale(self, folder: str) -> str | None:
        """Return at which scale a folder of results repeats it, None if it does not."""
        found = re.fullmatch(rf"{re.escape(self.suite)}(?:-(cpu|paper)(-.+)?)?", folder)
        return None if found is None else "".join(part for part in found.groups() if part)


def read_index(path: Path) -> tuple[Exhibit, ...]:
    """Return the paper's tables and figures in its order; RecordError on a damaged file."""
    return tuple(_exhibit(path, line) for line in read_lines(path, INDEX_HEADER))


def _exhibit(path: Path, line: dict[str, str]) -> Exhibit:
    for key, known in ALLOWED.items():
        if line[key] not in known:
            raise RecordError(f"{path}: {key} is {line[key]!r}.{nearest(line[key], known)}")
    if len({line["numbers"] != "none", line["file"] != "", line["measure"] != ""}) > 1:
        raise RecordError(f"{path}: {line['title']!r} needs numbers, file and measure, or none.")
    return Exhibit(**line)  # type: ignore[arg-type]  # the loop has checked its words


def exhibit_of(folder: str, exhibits: Sequence[Exhibit]) -> Exhibit | None:
    """Return what a folder of results repeats, None if it is no place of the paper."""
    return next((each for each in exhibits if each.scale(folder) is not None), None)


def in_order(folders: Iterable[str], exhibits: Sequence[Exhibit]) -> list[str]:
    """Return folders of results in the paper's order, those that it does not have at the end."""

    def position(folder: str) -> tuple[int, str]:
        found = exhibit_of(folder, exhibits)
        return len(exhibits) if found is None else exhibits.index(found), folder

    return sorted(folders, key=position)


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
        for line in lines:
            if not re.fullmatch(r"-?\d+(\.\d+)?", line["value"]):
                raise RecordError(f"{path}: {line['value']!r} is not a number.")
        typed = {(line["row"], line["column"]): line["value"] for line in lines}
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


def read_lines(path: Path, header: Sequence[str]) -> list[dict[str, str]]:
    """Return a file's lines by column.

    Raises RecordError unless it holds that header and at least one line, each with a text for
    every column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first, *lines = [*csv.reader(file, strict=True)] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is not CSV in UTF-8 ({error}).") from error
    if first != list(header) or not lines:
        raise RecordError(f"{path} must have lines under the header {','.join(header)}.")
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise RecordError(f"{path}, line {number} must have {len(header)} columns.")
    return [dict(zip(header, line, strict=True)) for line in lines]
