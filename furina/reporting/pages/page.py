"""One HTML page of all results: nothing is fetched, and without scripts it is only unsorted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from furina.reporting.pages.inline import inline
from furina.reporting.tables.cells import Cell, Number, Table
from furina.reporting.tables.render import exact, grouped

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
    files of that folder, or only shown. `records` holds by row the files, as seen from the page,
    that its numbers come from.
    """

    name: str
    title: str
    lead: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()
    written: bool = True
    records: Mapping[str, Sequence[str]] = field(default_factory=dict)


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
    names = _Names()
    text = environment.get_template("page.html").render(
        title=TITLE,
        sections=[_section(section, names) for section in sections],
        style=(FOLDER / "page.css").read_text("utf-8"),
        script=(FOLDER / "page.js").read_text("utf-8"),
    )
    return "\n".join(line.rstrip() for line in text.split("\n")).rstrip("\n") + "\n"


def _section(section: Section, names: _Names) -> dict[str, Any]:
    """Return what the template shows of a section; every part of it has an id of its own."""
    own = names.new(section.name)
    pictures = [_picture(drawing, names.new(own, drawing.name)) for drawing in section.drawings]
    ids = {row: names.new(own, "records", row) for row in section.records}
    files = dict.fromkeys(file for found in section.records.values() for file in found)
    links = {Path(file).stem: file for file in files if file.endswith(".json")}
    links |= {row: f"#{name}" for row, name in ids.items()}
    source = f"{section.name}/tables/{{}}.csv" if section.written else ""
    grids = [
        _grid(table, names.new(own, table.name), table.source or source.format(table.name), links)
        for table in section.tables
    ]
    return {
        "id": own,
        "name": section.name,
        "title": section.title,
        "lead": section.lead,
        "grids": grids,
        "pictures": pictures,
        "records": [(ids[row], row, found) for row, found in section.records.items()],
    }


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


def _picture(drawing: Drawing, own: str) -> dict[str, str]:
    return {"id": own, "title": drawing.title, "svg": inline(drawing.svg, own, drawing.themed)}


def _grid(table: Table, own: str, source: str, links: Mapping[str, str]) -> dict[str, Any]:
    marks = table.footnotes
    return {
        "id": own,
        "title": table.title,
        "groups": _groups(table.columns),
        "heads": [
            {"name": name, "is_numeric": _is_sorted_as_numbers(table, i)}
            for i, (_, name) in enumerate(table.columns)
        ],
        "rows": [[_box(cell, marks) for cell in line] for line in table.lines],
        "links": [links.get(line[0].text) for line in table.lines],
        "notes": [(mark, sentence) for sentence, mark in marks.items()],
        "remarks": table.remarks,
        "source": source,
    }


def _is_sorted_as_numbers(table: Table, column: int) -> bool:
    """Tell whether no cell of a column is a word; is_numeric also holds where one is missing."""
    return not any(isinstance(sort_value(line[column]), str) for line in table.lines)


def _groups(columns: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """Return the heads over several columns; the first, which stays in sight, has its own."""
    if not any(group for group, _ in columns):
        return []
    found = [(group, len(members)) for group, members in grouped(columns[1:])]
    return [(columns[0][0], 1), *found]


def _box(cell: Cell, marks: Mapping[str, str]) -> dict[str, Any]:
    """Return a cell for the template: `value` is what it sorts by, None where it is missing."""
    value = sort_value(cell)
    return {
        "text": cell.text,
        "bold": cell.bold,
        "marks": [marks[note] for note in cell.notes],
        "value": None if value is None else exact(value),
    }


def sort_value(cell: Cell) -> Number:
    """Return the number, unrounded, or the word that a cell sorts by: its first one by name."""
    named = cell.numbers
    return named[""] if "" in named else next(iter(named.values()), None)
