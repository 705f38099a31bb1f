from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from furina.reporting.tables import render
from furina.reporting.tables.cells import MISSING, Cell, Table, build, label, missing
from furina.reporting.tables.main import main_table
from tests.reporting.frames import load_suite, rows_of

NASTY = "50 % of a_b & c|d <e> ~ ^ {x} # $ \\ “q” × – *"


@pytest.fixture
def small() -> Table:
    rows = [
        {
            ("", "method"): label("lora_r128"),
            ("speed, ms", "first"): Cell("1.2 ± 0.1", {"": 1.23456789, "stderr": 0.1}, ("slow",)),
            ("speed, ms", "last"): missing("never ran"),
        },
        {
            ("", "method"): label(NASTY, "odd"),
            ("speed, ms", "first"): missing("never ran"),
            ("speed, ms", "last"): Cell("3", {"": 3}, ("slow", "odd"), bold=True),
        },
    ]
    return build("small", "A small_table", rows, ("All is 100 % well.",))


def test_footnotes_are_lettered_in_reading_order(small: Table) -> None:
    assert small.footnotes == {"slow": "a", "never ran": "b", "odd": "c"}


def test_the_letters_go_on_after_z() -> None:
    row = {("", f"{i}"): missing(f"note {i}") for i in range(30)}
    marks = list(build("many", "Many", [row]).footnotes.values())
    assert marks[24:29] == ["y", "z", "aa", "ab", "ac"]


def test_markdown_has_as_many_cells_in_every_line(small: Table) -> None:
    lines = [line for line in render.markdown(small).splitlines() if line.startswith("|")]
    counts = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(lines) == 2 + len(small.frame)
    assert counts == {1 + small.frame.shape[1]}


def test_markdown_shows_marks_bold_footnotes_and_remarks(small: Table) -> None:
    text = render.markdown(small)
    assert "1.2 ± 0.1 <sup>a</sup>" in text
    assert "**3** <sup>a,c</sup>" in text
    assert "<sup>b</sup> never ran." in text
    assert text.endswith("All is 100 % well.\n")


def test_markdown_escapes_what_it_would_read_as_markup(small: Table) -> None:
    row = next(line for line in render.markdown(small).splitlines() if "50 %" in line)
    assert r"c\|d \<e\>" in row
    assert r"a\_b" in row


def test_latex_escapes_every_special_character(small: Table) -> None:
    row = next(line for line in render.latex(small).splitlines() if line.startswith("50"))
    text = row.split(" & ")[0] if r"\&" not in row else row
    for special in (r"50 \%", r"a\_b", r"\&", r"\textbar{}", r"\textless{}", r"\textasciitilde{}"):
        assert special in text
    for special in (
        r"\textasciicircum{}",
        r"\{x\}",
        r"\#",
        r"\$",
        r"\textbackslash{}",
        r"$\times$",
    ):
        assert special in text
    assert not re.search(r"(?<!\\)[%#_]", text)


def test_latex_is_a_booktabs_table_with_a_head_per_group(small: Table) -> None:
    text = render.latex(small)
    order = [r"\toprule", r"\cmidrule(lr){2-3}", r"\midrule", r"\bottomrule", r"\end{table}"]
    assert sorted(order, key=text.index) == order
    assert r"\begin{tabular}{lrr}" in text
    assert r"\multicolumn{2}{c}{speed, ms}" in text
    assert r"\textbf{3}\textsuperscript{a,c} \\" in text


def test_every_line_of_latex_has_the_same_number_of_cells(folder: Path) -> None:
    table = main_table(load_suite(folder))
    body = render.latex(table).split(r"\midrule")[1].split(r"\bottomrule")[0]
    rows = body.strip().splitlines()
    assert len(rows) == len(table.frame)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {table.frame.shape[1] - 1}


def test_latex_of_the_main_table_is_ascii_but_for_known_letters(folder: Path) -> None:
    assert render.latex(main_table(load_suite(folder))).isascii()


def test_csv_holds_the_unrounded_numbers_in_columns_of_their_own(small: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(render.csv(small))))
    assert rows[0] == {
        "method": "lora_r128",
        "speed ms first": "1.23456789",
        "speed ms first stderr": "0.1",
        "speed ms last": "",
        "notes": "slow (speed ms first); never ran (speed ms last)",
    }
    assert rows[1]["method"] == NASTY
    assert rows[1]["speed ms last"] == "3"


def test_csv_of_the_main_table_has_every_number_that_markdown_shows(folder: Path) -> None:
    table = main_table(load_suite(folder))
    rows = list(csv.DictReader(io.StringIO(render.csv(table))))
    for row, record in zip(rows, rows_of(table), strict=True):
        for (group, name), cell in record.items():
            column = " ".join(part for part in (group, name) if part).replace(",", "")
            number = cell.numbers[""]
            if isinstance(number, str) or number is None:
                assert row[column] == (number or "")
            else:
                assert float(row[column]) == pytest.approx(number)


def printed(table: Table, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    render.print_tables([table], console)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_wide_terminal_shows_one_block_and_a_narrow_one_repeats_the_keys(folder: Path) -> None:
    table = main_table(load_suite(folder))
    wide, narrow = printed(table, 400), printed(table, 100)
    assert len(re.findall(r"^ furina ", wide, re.M)) == 1
    assert len(re.findall(r"^ furina ", narrow, re.M)) > 2
    assert max(map(len, narrow.splitlines())) <= 100


@pytest.mark.parametrize("width", [90, 120, 400])
def test_a_terminal_shows_every_cell_whole(width: int, folder: Path) -> None:
    table = main_table(load_suite(folder))
    text = printed(table, width)
    for cell in table.frame.to_numpy().ravel():
        assert cell.text in text
    assert "…" not in text


def test_a_terminal_does_not_read_cells_as_markup(small: Table) -> None:
    rows = [{("", "method"): label("[bold]x[/bold]"), ("", "n"): missing("[red]why[/red]")}]
    text = printed(build("markup", "[b]T[/b]", rows), 80)
    assert "[bold]x[/bold]" in text
    assert "[red]why[/red]" in text
    assert f"{MISSING} [a]" in text
