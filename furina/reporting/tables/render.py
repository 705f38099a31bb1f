"""One table, four forms: terminal, Markdown, CSV and LaTeX, all from the same frame."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Literal

import pandas as pd
import rich.box
from rich.console import Console, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from furina.reporting.tables.cells import Cell, Number, Table

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "−": r"$-$",
        "α": r"$\alpha$",
        "Δ": r"$\Delta$",
        "–": "--",
        "—": "---",
        "★": r"$\star$",
        "…": r"\ldots{}",
        "“": "``",
        "”": "''",
    }
)
MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\|*_`<>[]"})
SEPARATOR = 3


def escape(text: str, characters: dict[int, str]) -> str:
    """Return `text` on one line, with each special character replaced."""
    return " ".join(text.split()).translate(characters)


def _rows(table: Table, write: Callable[[Cell, str], str]) -> list[list[str]]:
    """Return every cell as text; `write` gets the cell and its footnotes' marks ("a,b")."""
    marks = table.footnotes
    return [
        [write(cell, ",".join(marks[n] for n in cell.notes)) for cell in row] for row in table.lines
    ]


def markdown(table: Table) -> str:
    """Return the table as GitHub Markdown, with its footnotes and remarks beneath."""

    def write(cell: Cell, marks: str) -> str:
        text = escape(cell.text, MARKDOWN)
        text = f"**{text}**" if cell.bold else text
        return f"{text} <sup>{marks}</sup>" if marks else text

    columns = table.columns
    heads = [escape(g, MARKDOWN) + ("<br>" if g else "") + escape(n, MARKDOWN) for g, n in columns]
    rules = ["---:" if table.is_numeric(i) else "---" for i in range(len(columns))]
    lines = ["| " + " | ".join(row) + " |" for row in (heads, rules, *_rows(table, write))]
    notes = [f"<sup>{mark}</sup> {escape(n, MARKDOWN)}." for n, mark in table.footnotes.items()]
    remarks = [escape(remark, MARKDOWN) for remark in table.remarks]
    beneath = "<br>".join(notes + remarks)  # one line: a README has few
    return "\n".join(lines) + "\n" + (f"\n{beneath}\n" if beneath else "")


def csv(table: Table) -> str:
    """Return every number of the table, a column each, unrounded; notes come last."""
    columns = table.columns
    rows = table.lines
    records = []
    for row in rows:
        record: dict[str, str] = {}
        for i, (column, cell) in enumerate(zip(columns, row, strict=True)):
            # A missing cell has no named numbers, so the column's names come from all rows.
            for key in dict.fromkeys(key for other in rows for key in other[i].numbers):
                record[_csv_name(*column, key)] = exact(cell.numbers.get(key))
        record["notes"] = "; ".join(_noted(columns, row))
        records.append(record)
    return pd.DataFrame(records).to_csv(index=False, lineterminator="\n")


def _csv_name(*parts: str) -> str:
    return " ".join(part for part in parts if part).replace(",", "")


def _noted(columns: Sequence[tuple[str, str]], row: Sequence[Cell]) -> Iterator[str]:
    """Yield each note of a row with the columns that it is about."""
    for sentence in dict.fromkeys(note for cell in row for note in cell.notes):
        about = [_csv_name(*c) for c, x in zip(columns, row, strict=True) if sentence in x.notes]
        yield f"{sentence} ({', '.join(about)})"


def exact(number: Number) -> str:
    """Return a number unrounded, "" for a missing one."""
    if number is None:
        return ""
    return f"{number:.10g}" if isinstance(number, float) else str(number)


def latex(table: Table) -> str:
    """Return the table as a LaTeX table environment for the booktabs package."""

    def write(cell: Cell, marks: str) -> str:
        text = escape(cell.text, LATEX)
        text = rf"\textbf{{{text}}}" if cell.bold else text
        return rf"{text}\textsuperscript{{{marks}}}" if marks else text

    columns = table.columns
    alignment = "".join("r" if table.is_numeric(i) else "l" for i in range(len(columns)))
    notes = [rf"\textsuperscript{{{m}}}{escape(n, LATEX)}." for n, m in table.footnotes.items()]
    notes += [escape(remark, LATEX) for remark in table.remarks]
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(table.title, LATEX)}}}",
        rf"\label{{tab:{table.name}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        *_latex_groups(columns),
        " & ".join(escape(name, LATEX) for _, name in columns) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in _rows(table, write)),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par\footnotesize {note}" for note in notes),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_groups(columns: Sequence[tuple[str, str]]) -> list[str]:
    if not any(group for group, _ in columns):
        return []
    heads, rules = [], []
    for group, members in grouped(columns):
        heads.append(rf"\multicolumn{{{len(members)}}}{{c}}{{{escape(group, LATEX)}}}")
        rules += [rf"\cmidrule(lr){{{members[0] + 1}-{members[-1] + 1}}}"] if group else []
    return [" & ".join(heads) + r" \\", " ".join(rules)]


def grouped(columns: Sequence[tuple[str, str]]) -> list[tuple[str, list[int]]]:
    """Return runs of neighbouring columns of one group, as column numbers."""
    runs = groupby(range(len(columns)), key=lambda i: columns[i][0])
    return [(group, list(members)) for group, members in runs]


def terminal(table: Table, width: int) -> RenderableType:
    """Return the table for a terminal, cut between groups where `width` does not hold it.

    Every block repeats the key columns, so a row can be read on.
    """
    rows = _rows(table, lambda cell, marks: f"{cell.text} [{marks}]" if marks else cell.text)
    blocks = (_block(table, rows, columns) for columns in _blocks(table, rows, width))
    notes = [Text(f"[{mark}] {n}.", style="dim") for n, mark in table.footnotes.items()]
    notes += [Text(remark, style="dim") for remark in table.remarks]
    return Group(Text(table.title, style="bold"), *blocks, *notes, "")


def _blocks(table: Table, rows: list[list[str]], width: int) -> list[list[int]]:
    """Return the columns of each block: the keys, then as many whole groups as fit."""
    columns = table.columns
    widths = [
        max(len(text) for text in (*column, *(row[i] for row in rows))) + SEPARATOR
        for i, column in enumerate(columns)
    ]
    keys = list(range(table.keys))
    blocks: list[list[int]] = []
    for _, group in grouped(columns):
        added = [i for i in group if i not in keys]
        if not blocks or sum(widths[i] for i in (*blocks[-1], *added)) > width:
            blocks.append(list(keys))
        blocks[-1] += added
    return blocks


def _block(table: Table, rows: list[list[str]], block: Sequence[int]) -> RichTable:
    columns = table.columns
    rich_table = RichTable(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    has_groups = any(columns[i][0] for i in block)
    shown = ""
    for i in block:
        group, name = columns[i]
        head = f"{'' if group == shown else group}\n{name}" if has_groups else name
        shown = group
        justify: Literal["left", "right"] = "right" if table.is_numeric(i) else "left"
        rich_table.add_column(Text(head), justify=justify, no_wrap=True)
    for row, texts in zip(table.lines, rows, strict=True):
        styled = [Text(texts[i], style="bold" if row[i].bold else "") for i in block]
        rich_table.add_row(*styled)
    return rich_table


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """Print tables to a terminal, fitted to its width."""
    for table in tables:
        console.print(terminal(table, console.width))
