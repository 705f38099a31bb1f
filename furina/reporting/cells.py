"""A table is one pandas frame of cells: what is shown, the numbers behind it, and its notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

Number = float | int | str | None
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, its numbers by name ("" is the main one) and its footnotes' sentences."""

    text: str
    numbers: Mapping[str, Number] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bold: bool = False


Row = dict[tuple[str, str], Cell]


def label(text: str, *notes: str) -> Cell:
    """Return a cell that holds words."""
    return Cell(text, {"": text}, notes)


def missing(*notes: str) -> Cell:
    """Return the cell of a number that does not exist, with the reason."""
    return Cell(MISSING, {"": None}, notes)


def decimals(value: float) -> int:
    """Return how many decimals show `value` with about three digits."""
    return sum(abs(value) < bound for bound in (100, 10))


@dataclass(frozen=True)
class Table:
    """A frame of cells with (group, column) headers; `name` is the stem of its files.

    The first `keys` columns name a row: a narrow terminal repeats them in every block.
    """

    name: str
    title: str
    frame: pd.DataFrame
    remarks: tuple[str, ...] = ()
    keys: int = 1

    @property
    def footnotes(self) -> dict[str, str]:
        """Return each note's mark (a, b, …) by its sentence, in reading order."""
        cells = self.frame.to_numpy().ravel().tolist()
        sentences = dict.fromkeys(note for cell in cells for note in cell.notes)
        return {sentence: _mark(i) for i, sentence in enumerate(sentences)}


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
