"""The tables of a benchmark, kept in its JSON beside what they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furina.records import RecordError, codec
from furina.reporting.tables.cells import Cell, Table, build
from furina.reporting.tables.render import markdown
from furina.storage import write_text

KEY = "page"


@dataclass(frozen=True)
class StoredTable:
    """A table whose cells are [text, number or word, note, …], line by line."""

    name: str
    title: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[tuple[tuple[object, ...], ...], ...]
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, table: Table) -> StoredTable:
        """Return a table as it is stored: the main number of each cell, and no bold."""
        lines = tuple(
            tuple((cell.text, cell.numbers.get(""), *cell.notes) for cell in line)
            for line in table.lines
        )
        return cls(table.name, table.title, tuple(table.columns), lines, table.remarks)

    @property
    def table(self) -> Table:
        """Return the table; raises RecordError where it has no lines or they have other lengths."""
        if not self.lines or {len(line) for line in self.lines} != {len(self.columns)}:
            raise RecordError(f"The table {self.title!r} has no lines, or lines of other lengths.")
        rows = [
            {
                column: Cell(str(text), {"": value}, map(str, notes))  # type: ignore[dict-item]
                for column, (text, value, *notes) in zip(self.columns, line, strict=True)
            }
            for line in self.lines
        ]
        return build(self.name, self.title, rows, self.remarks)


@dataclass(frozen=True)
class StoredPage:
    """What a benchmark shows: a title, paragraphs, a picture's title, tables, and what follows."""

    title: str
    paragraphs: tuple[str, ...]
    picture: str
    tables: tuple[StoredTable, ...]
    after: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> StoredPage:
        """Read it from a benchmark's JSON; raises RecordError where that holds none."""
        page: StoredPage = codec.decode(
            cls, json.loads(path.read_text("utf-8")).get(KEY), str(path)
        )
        return page

    def markdown(self, picture: str) -> str:
        """Return the page as Markdown; `picture` is the name of its figure's file."""
        parts = [f"# {self.title}"] * bool(self.title) + list(self.paragraphs)
        parts += [f"![{self.picture}]({picture})"] * bool(self.picture)
        for each in self.tables:
            parts += [f"## {each.title}"] * (each.title != self.title)
            parts.append(markdown(each.table).rstrip())
        return "\n\n".join([*parts, *self.after]) + "\n"


def write_page(stem: Path, report: Mapping[str, Any], page: StoredPage) -> None:
    """Write a benchmark's numbers with its page as `stem`.json, and the page as `stem`.md."""
    text = codec.dumps({**report, KEY: codec.encode(page)})
    write_text(stem.with_suffix(".json"), text + "\n")
    write_text(stem.with_suffix(".md"), page.markdown(f"{stem.name}.svg"))
