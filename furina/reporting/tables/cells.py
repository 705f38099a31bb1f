"""A table is one pandas frame of cells: what is shown, the numbers behind it, and its notes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import pandas as pd

Number = float | int | str | None
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, its numbers by name ("" is the main one) and its footnotes' sentences.

    A sentence that is given twice counts once.
    """

    text: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    notes: Iterable[str] = ()
    bold: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(dict.fromkeys(self.notes)))


Row = dict[tuple[str, str], Cell]
"""The cells of a line by (group, column)."""


def label(text: str, *notes: str) -> Cell:
    """Return a cell that holds words."""
    return Cell(text, {"": text}, notes)


def number(value: float | None, form: str = "", notes: Iterable[str] = ()) -> Cell:
    """Return a number as a format specification shows it; None is a missing one."""
    return missing(*notes) if value is None else Cell(format(value, form), {"": value}, notes)


def fewest_to_most(counts: Collection[int], notes: Iterable[str] = ()) -> Cell:
    """Return the range of counts; its number is the fewest."""
    fewest, most = min(counts), max(counts)
    return Cell(f"{fewest}" if fewest == most else f"{fewest} to {most}", {"": fewest}, notes)


def interval(
    value: float,
    ends: tuple[float, float] | None,
    places: int = 1,
    sign: str = "+",
    notes: Iterable[str] = (),
) -> Cell:
    """Return a number with its interval, where there is one, and so many decimals."""
    text, numbers = f"{value:{sign}.{places}f}", {"": value}
    if ends is not None:
        text += f" [{ends[0]:+.{places}f}, {ends[1]:+.{places}f}]"
        numbers |= {"low": ends[0], "high": ends[1]}
    return Cell(text, numbers, notes)


def missing(*notes: str) -> Cell:
    """Return the cell of a number that does not exist, with the reason."""
    return Cell(MISSING, {"": None}, notes)


def decimals(value: float) -> int:
    """Return how many decimals show `value` with about three digits."""
    return sum(abs(value) < bound for bound in (100, 10))


@dataclass(frozen=True)
class Table:
    """A frame of cells with (group, column) headers; `name` is the stem of its files.

    The first `keys` columns name a row: a narrow terminal repeats them in every block. `source` is
    the file of results that its numbers come from, where that is one.
    """

    name: str
    title: str
    frame: pd.DataFrame
    remarks: tuple[str, ...] = ()
    keys: int = 1
    source: str = ""

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Return each column's group and name."""
        return [(str(column[0]), str(column[1])) for column in self.frame.columns]

    @property
    def lines(self) -> list[list[Cell]]:
        """Return the cells line by line."""
        lines: list[list[Cell]] = self.frame.to_numpy().tolist()
        return lines

    @property
    def footnotes(self) -> dict[str, str]:
        """Return each note's mark (a, b, …) by its sentence, in reading order."""
        sentences = dict.fromkeys(n for line in self.lines for cell in line for n in cell.notes)
        return {sentence: _mark(i) for i, sentence in enumerate(sentences)}

    def is_numeric(self, column: int) -> bool:
        """Tell whether the column with that number holds numbers, be they missing."""
        return any(not isinstance(line[column].numbers.get(""), str) for line in self.lines)


def build(
    name: str, title: str, rows: list[Row], remarks: tuple[str, ...] = (), keys: int = 1
) -> Table:
    """Return the table of `rows`, which all have the same (group, column) keys."""
    frame = pd.DataFrame([list(row.values()) for row in rows], dtype=object)
    frame.columns = pd.MultiIndex.from_tuples(list(rows[0]))
    return Table(name, title, frame, remarks, keys)


def _mark(index: int) -> str:
    letters = ""
    index += 1
    while index:
        index, digit = divmod(index - 1, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
