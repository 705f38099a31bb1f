"""The tables of a benchmark, kept in its JSON beside what they were made from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from furina.records import RecordError, codec
from furina.reporting.tables.cells import Cell, Table, build
from furina.reporting.tables.render import markdown
from furina.storage import write_text

KEY = "page"


@dataclass(frozen=True)
class Page:
    """What a benchmark shows: tables, a title, paragraphs, a picture's title, and what follows."""

    tables: Sequence[Table]
    title: str = ""
    paragraphs: Sequence[str] = ()
    picture: str = ""
    after: Sequence[str] = ()

    @classmethod
    def read(cls, path: Path) -> Page:
        """Read it from a benchmark's JSON; raises RecordError where that holds none."""
        try:
            value = json.loads(path.read_text("utf-8")).get(KEY)
        except (ValueError, AttributeError) as error:
            raise RecordError(f"{path} is no benchmark's JSON ({error}); run it again.") from error
        stored: _Page = codec.decode(_Page, value, f"{path}: {KEY}")
        tables = [table.table(path) for table in stored.tables]
        return cls(tables, stored.title, stored.paragraphs, stored.picture, stored.after)

    def write(self, stem: Path, report: Mapping[str, Any]) -> None:
        """Write a benchmark's numbers with the page as `stem`.json, and the page as `stem`.md."""
        stored = _Page(
            self.title,
            tuple(self.paragraphs),
            self.picture,
            tuple(map(_Table.of, self.tables)),
            tuple(self.after),
        )
        text = codec.dumps({**report, KEY: codec.encode(stored)})
        write_text(stem.with_suffix(".json"), text + "\n")
        write_text(stem.with_suffix(".md"), self.markdown(stem.name))

    def markdown(self, stem: str) -> str:
        """Return the page as Markdown; its picture lies beside it as `stem`.svg."""
        parts = [f"# {self.title}"] * bool(self.title) + [*self.paragraphs]
        parts += [f"![{self.picture}]({stem}.svg)"] * bool(self.picture)
        for table in self.tables:
            parts += [f"## {table.title}"] * (table.title != self.title)
            parts.append(markdown(table).rstrip())
        return "\n\n".join([*parts, *self.after]) + "\n"


@dataclass(frozen=True)
class _Table:
    """A table whose cells are [text, number or word, note, …], line by line, and none bold."""

    name: str
    title: str
    columns: tuple[tuple[str, str], ...]
    lines: tuple[tuple[tuple[object, ...], ...], ...]
    remarks: tuple[str, ...]

    @classmethod
    def of(cls, table: Table) -> _Table:
        lines = tuple(
            tuple((cell.text, cell.numbers.get(""), *cell.notes) for cell in line)
            for line in table.lines
        )
        return cls(table.name, table.title, tuple(table.columns), lines, table.remarks)

    def table(self, path: Path) -> Table:
        if not self.lines or {len(line) for line in self.lines} != {len(self.columns)}:
            raise RecordError(f"{path}: the table {self.title!r} has no lines, or uneven ones.")
        cells = [
            [Cell(str(text), {"": value}, map(str, notes)) for text, value, *notes in line]  # type: ignore[dict-item]
            for line in self.lines
        ]
        rows = [dict(zip(self.columns, line, strict=True)) for line in cells]
        return build(self.name, self.title, rows, self.remarks)


@dataclass(frozen=True)
class _Page:
    """A page as its JSON holds it."""

    title: str
    paragraphs: tuple[str, ...]
    picture: str
    tables: tuple[_Table, ...]
    after: tuple[str, ...]
