from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RecordError
from furina.reporting.pages.contents import BENCHMARKS
from furina.reporting.tables import render
from furina.reporting.tables.cells import Cell, Table, build, label, missing
from furina.reporting.tables.main import main_table
from furina.reporting.tables.stored import Page
from tests.reporting.frames import load_suite

RESULTS = Path(__file__).parents[2] / "results"
WRITTEN = sorted(path for name in BENCHMARKS for path in (RESULTS / name).rglob("*.md"))
NASTY = r"a|b \ * _x_ `c` <br> [d] <sup>e</sup> \| **"


def page(*tables: Table, title: str = "All") -> Page:
    return Page(tables, title, ("Made by `x`.",), "A picture", ("After.",))


@pytest.fixture
def nasty() -> Table:
    rows = [
        {
            ("", "variant"): label(NASTY, NASTY),
            (NASTY, "ms"): Cell("-1.50e-03", {"": -0.0015}, ("slow",)),
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
    heads = [(table.title, table.name, table.remarks, table.columns) for table in (one, other)]
    return one.lines == other.lines and heads[0] == heads[1]


def test_a_table_is_read_back_with_its_numbers_notes_and_remarks(
    nasty: Table, tmp_path: Path
) -> None:
    page(nasty).write(tmp_path / "step", {"seconds": [1.5]})
    found = Page.read(tmp_path / "step.json")
    assert same(found.tables[0], nasty)
    assert replace(found, tables=()) == replace(page(), tables=())
    assert json.loads((tmp_path / "step.json").read_text())["seconds"] == [1.5]


def test_a_real_table_is_read_back_as_it_looks(folder: Path, tmp_path: Path) -> None:
    made = main_table(load_suite(folder))
    page(made).write(tmp_path / "step", {})
    (table,) = Page.read(tmp_path / "step.json").tables
    assert render.markdown(table) == render.markdown(made)


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: str(path.relative_to(RESULTS)))
def test_the_committed_markdown_of_a_benchmark_is_its_json_byte_for_byte(path: Path) -> None:
    found = Page.read(path.with_suffix(".json"))
    assert found.tables
    assert found.markdown(path.stem) == path.read_text()


def test_the_markdown_has_heading_paragraphs_picture_and_tables(
    nasty: Table, tmp_path: Path
) -> None:
    page(nasty).write(tmp_path / "step", {})
    table = f"## One step\n\n{render.markdown(nasty)}"
    text = f"# All\n\nMade by `x`.\n\n![A picture](step.svg)\n\n{table}\nAfter.\n"
    assert (tmp_path / "step.md").read_text() == text
    alone = page(nasty, title="One step").markdown("step")
    assert alone.count("One step") == 1, "a page of one table says its title once"


def test_a_damaged_page_is_one_sentence(nasty: Table, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    page(nasty).write(path.with_suffix(""), {})
    written = json.loads(path.read_text())
    for lines in ([written["page"]["tables"][0]["lines"][0][1:]], []):
        written["page"]["tables"][0]["lines"] = lines
        path.write_text(json.dumps(written))
        with pytest.raises(RecordError, match=r"step.json: the table 'One step' has no lines"):
            Page.read(path)
    path.write_text("{}")
    with pytest.raises(RecordError, match=r"step.json: page must be an object with the keys title"):
        Page.read(path)
    path.write_text("{")
    with pytest.raises(RecordError, match=r"step.json is no benchmark's JSON"):
        Page.read(path)
