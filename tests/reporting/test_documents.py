from __future__ import annotations

from pathlib import Path

import pytest

from furina.records import RecordError
from furina.reporting.pages.contents import BENCHMARKS
from furina.reporting.tables import render
from furina.reporting.tables.cells import Cell, Table, build, label, missing
from furina.reporting.tables.main import main_table
from furina.reporting.tables.stored import read_document
from tests.reporting.frames import load_suite

RESULTS = Path(__file__).parents[2] / "results"
WRITTEN = sorted(path for name in BENCHMARKS for path in (RESULTS / name).rglob("*.md"))
NASTY = r"a|b \ * _x_ `c` <br> [d] <sup>e</sup> \| **"


def written(tmp_path: Path, *tables: Table) -> Path:
    path = tmp_path / "step.md"
    path.write_text("\n".join(f"## {t.title}\n\n{render.markdown(t)}" for t in tables))
    return path


@pytest.fixture
def nasty() -> Table:
    rows = [
        {
            ("", "variant"): label(NASTY, NASTY),
            (NASTY, "ms"): Cell("-1.50e-03", {"": -0.0015}, ("slow",), bold=True),
            (NASTY, NASTY): missing("never ran", "slow"),
        },
        {
            ("", "variant"): label(""),
            (NASTY, "ms"): Cell("12 to 13", {"": 12.0}),
            (NASTY, NASTY): Cell("−3.0 %", {"": -3.0}, ("slow",)),
        },
    ]
    return build("step-1", "One step", rows, (NASTY, "Made by benchmarks/x.py."))


def same(one: Table, other: Table) -> bool:
    cells = [table.frame.to_numpy().tolist() for table in (one, other)]
    heads = [
        (table.title, table.name, table.remarks, list(table.frame.columns))
        for table in (one, other)
    ]
    return bool(cells[0] == cells[1] and heads[0] == heads[1])


def test_a_table_is_read_back_with_its_numbers_notes_and_remarks(
    nasty: Table, tmp_path: Path
) -> None:
    (table,) = read_document(written(tmp_path, nasty)).tables
    assert same(table, nasty)


def test_a_real_table_is_read_back_as_it_looks(folder: Path, tmp_path: Path) -> None:
    made = main_table(load_suite(folder))
    (table,) = read_document(written(tmp_path, made)).tables
    assert render.markdown(table) == render.markdown(made)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(RESULTS)))
def test_every_committed_table_of_the_benchmarks_is_read_back_byte_for_byte(path: Path) -> None:
    document = read_document(path)
    text = path.read_text()
    assert document.tables
    assert text.count("\n| ---") == len(document.tables)
    for table in document.tables:
        assert f"# {table.title}\n" in text
        assert render.markdown(table).rstrip() in text


def test_headings_paragraphs_and_pictures_are_told_apart(nasty: Table, tmp_path: Path) -> None:
    path = written(tmp_path, nasty)
    path.write_text(
        f"# All\n\nMade by `x`.\n\n![A picture](step.svg)\n\n{path.read_text()}\nAfter.\n"
    )
    document = read_document(path)
    assert (document.title, document.picture) == ("All", "A picture")
    assert document.paragraphs == ("Made by x.", "After.")
    assert [table.title for table in document.tables] == ["One step"]


@pytest.mark.parametrize(
    "table",
    [
        "| a | b |\n| --- | --- |\n| 1 |",
        "| a | b |\n| --- | --- |",
        "| a | a |\n| --- | --- |\n| 1 | 2 |",
        "| a |\n| :--- |\n| 1 |",
        "| a |\n| --- |\n| 1 <sup>z</sup> |",
        "| a |\n| --- |\n| <b>1</b> |",
    ],
)
def test_a_table_of_another_form_is_one_sentence(table: str, tmp_path: Path) -> None:
    path = tmp_path / "step.md"
    path.write_text(f"## Title\n\n{table}\n")
    with pytest.raises(RecordError, match="the table 'Title'"):
        read_document(path)
