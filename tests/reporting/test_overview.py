from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RunRecord
from furina.reporting.read import scores as numbers
from furina.reporting.tables import notes
from furina.reporting.tables.cells import Cell, Table
from furina.reporting.tables.main import main_table
from furina.reporting.tables.overview import NO_USUAL, UNMERGED, WIDEST, overview_table
from tests.records import fakes
from tests.reporting.frames import load_suite, rows_of

README = Path(__file__).parents[2] / "README.md"
ARC = "arc_easy", "acc, %"
TIME = "", "training time"


def cell(table: Table, row: str, column: tuple[str, str]) -> Cell:
    (found,) = (cells for cells in rows_of(table) if cells["", "method"].text == row)
    return found[column]


def edit(folder: Path, change: Callable[[RunRecord], RunRecord], pattern: str = "*.json") -> Table:
    for path in folder.glob(pattern):
        change(RunRecord.read(path)).write(path)
    return overview_table(load_suite(folder))


def with_tasks(folder: Path, number: int) -> Table:
    """Let every run on arc_easy have scored further tasks as well, without outputs."""

    def score_more(record: RunRecord) -> RunRecord:
        more = [f"task{i}" for i in range(number - len(fakes.TASKS))]
        scores = [replace(s, task=task, samples=None) for s in record.evaluations for task in more]
        data = [replace(record.data[0], task=task) for task in more]
        evaluations, rows = (*record.evaluations, *scores), (*record.data, *data)
        return replace(record, evaluations=evaluations, data=rows)

    return edit(folder, score_more, "*--arc_easy--*.json")


def test_two_tasks_take_seven_columns(folder: Path) -> None:
    table = overview_table(load_suite(folder))
    assert [" ".join(filter(None, column)) for column in rows_of(table)[0]] == [
        "method",
        "trainable",
        "arc_easy acc, %",
        "openbookqa acc, %",
        "time per token unmerged",
        "time per token merged",
        "training time",
    ]


def test_what_would_be_wider_than_a_page_shows_the_mean_of_its_tasks(folder: Path) -> None:
    three, four = with_tasks(folder, 3), with_tasks(folder, 4)
    assert [len(table.frame.columns) for table in (three, four)] == [WIDEST, 6]
    shown = cell(four, "furina", ("mean of 4 tasks", "%"))
    suite = load_suite(folder)
    ours, base = (numbers.macro(suite, *at) for at in (("furina", "merged"), BASE))
    assert isinstance(ours, float) and isinstance(base, float)
    assert shown.numbers[""] == pytest.approx(ours)
    assert shown.numbers["gain"] == pytest.approx(ours - base)


BASE = "base", "unmerged"


def test_an_accuracy_is_the_merged_models_with_its_own_gain(folder: Path) -> None:
    suite = load_suite(folder)
    shown = cell(overview_table(suite), "furina", ARC)
    merged = cell(main_table(suite), "furina", ("arc_easy acc, %", "merged"))
    gain = numbers.gain(suite, "furina", "arc_easy", "merged")
    assert gain and gain.stderr
    assert gain != numbers.gain(suite, "furina", "arc_easy")
    expected = f"{merged.text} ({100 * gain.value:+.1f} ± {100 * gain.stderr:.1f})"
    assert shown.text == expected


def test_base_has_its_own_accuracy_and_no_gain(folder: Path) -> None:
    suite = load_suite(folder)
    shown = cell(overview_table(suite), "base", ARC)
    assert shown.text == cell(main_table(suite), "base", ("arc_easy acc, %", "unmerged")).text


def test_seeds_are_averaged_and_few_are_said(folder: Path, seeded: Path) -> None:
    table = overview_table(load_suite(folder))
    assert cell(table, "lora", ("", "method")).notes == (notes.ONE_SEED,)
    suite = load_suite(seeded)
    table = overview_table(suite)
    assert cell(table, "lora", ("", "method")).notes == ()
    values = [100 * score.value for _, score in numbers.scores(suite, "lora", "arc_easy", "merged")]
    shown = cell(table, "lora", ARC)
    assert shown.text.startswith(f"{statistics.fmean(values):.1f} ± ")
    assert "sd" not in shown.text


def test_a_method_that_does_not_merge_shows_its_unmerged_accuracy_and_says_so(folder: Path) -> None:
    def routed(record: RunRecord) -> RunRecord:
        scores = tuple(s for s in record.evaluations if s.variant != "merged")
        times = tuple(time for time in record.latency if time.variant != "merged")
        return replace(record, evaluations=scores, latency=times, merge=None)

    table = edit(folder, routed, "lora--*.json")
    assert UNMERGED in cell(table, "lora", ("", "method")).notes
    assert UNMERGED not in cell(table, "furina", ("", "method")).notes
    unmerged = cell(main_table(load_suite(folder)), "lora", ("arc_easy acc, %", "unmerged")).text
    assert cell(table, "lora", ARC).text.startswith(unmerged)
    assert cell(table, "lora", ("time per token", "merged")).text == "–"


def test_a_row_whose_runs_failed_is_a_line_of_dashes(folder: Path) -> None:
    table = edit(
        folder, lambda r: replace(r, status="failed", evaluations=(), latency=()), "lora--*.json"
    )
    (row,) = (cells for cells in rows_of(table) if cells["", "method"].text == "lora")
    assert row["", "method"].notes == ()
    assert {found.text for found in row.values()} == {"lora", "–"}


@pytest.mark.parametrize("variant", ["unmerged", "merged"])
def test_a_time_is_its_ratio_in_the_main_table(variant: str, folder: Path) -> None:
    suite = load_suite(folder)
    shown = cell(overview_table(suite), "furina", ("time per token", variant))
    main = cell(main_table(suite), "furina", ("time per token, ms", variant))
    assert main.text.endswith(f"({shown.text})")


def test_training_time_is_compared_with_loras(folder: Path) -> None:
    suite = load_suite(folder)
    table, main = overview_table(suite), main_table(suite)
    minutes = [cell(main, row, ("training", "minutes")).numbers[""] for row in ("furina", "lora")]
    ours, theirs = (number for number in minutes if isinstance(number, float))
    assert cell(table, "furina", TIME).numbers[""] == pytest.approx(ours / theirs)
    assert cell(table, "lora", TIME).text == "1.00×"
    assert cell(table, "base", TIME).notes == (notes.ONE_MODEL,)


def test_without_lora_there_is_no_ratio_and_the_reason(folder: Path) -> None:
    for path in folder.glob("lora--*.json"):
        path.unlink()
    shown = cell(overview_table(load_suite(folder)), "furina", TIME)
    assert (shown.text, shown.notes) == ("–", (NO_USUAL,))


def test_only_records_that_are_older_than_a_change_are_marked(folder: Path) -> None:
    changes = folder.parent / "numerics.csv"
    text = "date,area,what\n{}-01-01T00:00:00+00:00,time,all is faster\n"
    changes.write_text(text.format(2020))
    table = overview_table(load_suite(folder))
    assert not any("made before" in note for note in table.footnotes)
    changes.write_text(text.format(2099))
    table = overview_table(load_suite(folder))
    for column in (("time per token", "merged"), TIME):
        assert cell(table, "lora", column).notes == ("made before: all is faster",)
    assert "made before: all is faster" not in cell(table, "lora", ARC).notes


def test_it_says_in_which_dtype_it_was_computed(folder: Path) -> None:
    assert "Computed in bfloat16." in overview_table(load_suite(folder)).remarks


def test_the_readmes_tables_are_as_narrow_as_a_page() -> None:
    heads = re.findall(r"^\| .*\n(?=\| -)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert heads
    assert max(head.count(" | ") + 1 for head in heads) <= WIDEST
