"""Read the Markdown of render.py back: what benchmarks wrote is shown again, not made again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from furina.records import RecordError
from furina.reporting.cells import Cell, Number, Row, Table, build

# Escaping leaves no bare | in a cell and no bare * or < in a text, so what is bare is markup.
CELLS = re.compile(r"((?:\\.|[^\\|])*)\|")
CELL = re.compile(r"(?P<text>(?:\\.|[^\\*<])*?) ?(?:<sup>(?P<marks>[a-z,]+)</sup>)?")
BOLD = re.compile(r"\*\*(?P<text>(?:\\.|[^\\*<])*)\*\* ?(?:<sup>(?P<marks>[a-z,]+)</sup>)?")
NOTE = re.compile(r"<sup>(?P<mark>[a-z]+)</sup> (?P<sentence>.*)\.")
PICTURE = re.compile(r"!\[(?P<title>[^\]]*)\]\([\w.-]+\.svg\)")
NUMBER = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?")
RULES = {"---": False, "---:": True}
"""Whether a column holds numbers, by the rule beneath its head."""


@dataclass(frozen=True)
class Document:
    """A page of Markdown: its first heading, its paragraphs, its tables, its picture's title."""

    title: str
    paragraphs: tuple[str, ...]
    tables: tuple[Table, ...]
    picture: str


def read_document(path: Path) -> Document:
    """Return what a file holds whose tables render.markdown wrote, each under its heading.

    A cell's number is the one that its text begins with, rounded as it was written. Raises
    RecordError where a table is not of that form.
    """
    blocks = path.read_text("utf-8").strip().split("\n\n")
    paragraphs: list[str] = []
    tables: list[Table] = []
    title = heading = picture = ""
    for above, block, below in zip(["", *blocks], blocks, [*blocks[1:], ""], strict=False):
        if block.startswith("#"):
            heading = block.lstrip("#").strip()
            title = title or heading
        elif block.startswith("|"):
            beneath = "" if below.startswith(("#", "|", "!")) else below
            name = f"{path.stem}-{len(tables) + 1}"
            tables.append(_table(path, name, heading, block.splitlines(), beneath))
        elif found := PICTURE.fullmatch(block):
            picture = found["title"]
        elif not above.startswith("|"):
            paragraphs.append(block.replace("`", ""))
    return Document(title, tuple(paragraphs), tuple(tables), picture)


def _table(path: Path, name: str, title: str, lines: list[str], beneath: str) -> Table:
    grid = [[cell.strip(" ") for cell in CELLS.findall(line[1:])] for line in lines]
    if len(grid) < 3 or {len(line) for line in grid} != {len(grid[0])}:
        raise RecordError(f"{path}: the table {title!r} has no rows, or rows of other lengths.")
    heads, rules, *body = grid
    columns = [_column(head) for head in heads]
    if not set(rules) <= RULES.keys() or len(set(columns)) < len(columns):
        raise RecordError(
            f"{path}: the table {title!r} has two equal columns or no rule of dashes."
        )
    pieces = beneath.split("<br>") if beneath else []
    notes = {m["mark"]: _plain(m["sentence"]) for m in map(NOTE.fullmatch, pieces) if m}
    remarks = tuple(_plain(piece) for piece in pieces if not NOTE.fullmatch(piece))
    rows: list[Row] = []
    for texts in body:
        cells = zip(texts, rules, strict=True)
        try:
            read = [_cell(text, RULES[rule], notes) for text, rule in cells]
        except (KeyError, ValueError) as error:
            raise RecordError(f"{path}: the table {title!r} has a cell {error}.") from error
        rows.append(dict(zip(columns, read, strict=True)))
    return build(name, title, rows, remarks)


def _column(head: str) -> tuple[str, str]:
    """Return a column's group and name from "group<br>name" or "name"."""
    group, _, name = head.rpartition("<br>")
    return _plain(group), _plain(name)


def _cell(source: str, is_number: bool, notes: Mapping[str, str]) -> Cell:
    bold = BOLD.fullmatch(source)
    match = bold or CELL.fullmatch(source)
    if match is None:
        raise ValueError(f"that does not read as text and footnotes: {source!r}")
    text = _plain(match["text"])
    marks = match["marks"].split(",") if match["marks"] else []
    number: Number = _number(text) if is_number else text
    return Cell(text, {"": number}, tuple(notes[mark] for mark in marks), bool(bold))


def _number(text: str) -> float | None:
    found = NUMBER.match(text.replace("−", "-"))
    return float(found[0]) if found else None


def _plain(source: str) -> str:
    return re.sub(r"\\(.)", r"\1", source)
