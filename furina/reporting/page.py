"""One HTML page of all results: nothing is fetched, and without scripts it is only unsorted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from furina.reporting.cells import Cell, Number, Table
from furina.reporting.inline import inline
from furina.reporting.render import columns_of, exact, grouped

FOLDER = Path(__file__).parent
TITLE = "FURINA: all results"


@dataclass(frozen=True)
class Drawing:
    """A figure: the stem of its file, what it shows, its SVG, and if it follows a dark theme."""

    name: str
    title: str
    svg: str
    themed: bool = True


@dataclass(frozen=True)
class Section:
    """A heading of the page and what stands under it.

    `name` is the folder in results/; `written` is whether the tables and figures are generated
    files of that folder, or only shown.
    """

    name: str
    title: str
    lead: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    written: bool = True


def page(sections: Sequence[Section]) -> str:
    """Return the page: a table of contents, then every section's tables and figures in order."""
    environment = Environment(
        loader=FileSystemLoader(FOLDER, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shown = _shown(sections)
    text = environment.get_template("page.html").render(
        title=TITLE,
        sections=shown,
        style=(FOLDER / "page.css").read_text("utf-8"),
        script=(FOLDER / "page.js").read_text("utf-8"),
    )
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n") + "\n"


class Head(NamedTuple):
    """A column's head: is what it holds sorted as numbers?"""

    name: str
    is_numeric: bool


class Group(NamedTuple):
    """A head over `width` columns."""

    name: str
    width: int


class Box(NamedTuple):
    """A cell as the page needs it: `value` is what it sorts by, None where it is missing."""

    text: str
    bold: bool
    marks: tuple[str, ...]
    value: str | None


class Grid(NamedTuple):
    """A table as the page needs it."""

    id: str
    title: str
    groups: list[Group]
    heads: list[Head]
    rows: list[list[Box]]
    notes: list[tuple[str, str]]
    remarks: tuple[str, ...]
    source: str


class Picture(NamedTuple):
    """A figure as the page needs it."""

    id: str
    title: str
    svg: str


class Shown(NamedTuple):
    """A section as the page needs it."""

    id: str
    name: str
    title: str
    lead: tuple[str, ...]
    pictures: list[Picture]
    grids: list[Grid]


def _shown(sections: Sequence[Section]) -> list[Shown]:
    names = _Names()
    return [_section(section, names) for section in sections]


def _section(section: Section, names: _Names) -> Shown:
    own = names.new(section.name)
    pictures = [_picture(drawing, names.new(own, drawing.name)) for drawing in section.drawings]
    grids = []
    for table in section.tables:
        source = f"{section.name}/tables/{table.name}.csv" if section.written else ""
        grids.append(_grid(table, names.new(own, table.name), source))
    return Shown(own, section.name, section.title, section.lead, pictures, grids)


class _Names:
    """Ids of one page: readable, and no two of them equal."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def new(self, *words: str) -> str:
        stem = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
        later = (f"{stem}-{number}" for number in count(2))
        chosen = stem if stem not in self._taken else next(n for n in later if n not in self._taken)
        self._taken.add(chosen)
        return chosen


def _picture(drawing: Drawing, own: str) -> Picture:
    return Picture(own, drawing.title, inline(drawing.svg, own, drawing.themed))


def _grid(table: Table, own: str, source: str) -> Grid:
    columns = columns_of(table)
    marks = table.footnotes
    cells: list[list[Cell]] = table.frame.to_numpy().tolist()
    return Grid(
        id=own,
        title=table.title,
        groups=list(_groups(columns)),
        heads=[Head(name, _is_sorted_as_numbers(table, i)) for i, (_, name) in enumerate(columns)],
        rows=[[_box(cell, [marks[note] for note in cell.notes]) for cell in row] for row in cells],
        notes=[(mark, sentence) for sentence, mark in marks.items()],
        remarks=table.remarks,
        source=source,
    )


def _is_sorted_as_numbers(table: Table, column: int) -> bool:
    """Tell whether no cell of a column is a word; is_numeric also holds where one is missing."""
    return not any(isinstance(sort_value(cell), str) for cell in table.frame.iloc[:, column])


def _groups(columns: Sequence[tuple[str, str]]) -> Iterator[Group]:
    """Yield the heads over several columns; the first column, which stays in sight, has its own."""
    if not any(group for group, _ in columns):
        return
    yield Group(columns[0][0], 1)
    for name, members in grouped(columns[1:]):
        yield Group(name, len(members))


def _box(cell: Cell, marks: Sequence[str]) -> Box:
    value = sort_value(cell)
    return Box(cell.text, cell.bold, tuple(marks), None if value is None else exact(value))


def sort_value(cell: Cell) -> Number:
    """Return the number, unrounded, or the word that a cell sorts by: its first one by name."""
    named = cell.numbers
    return named[""] if "" in named else next(iter(named.values()), None)
