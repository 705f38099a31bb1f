from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import get_args

import pytest

import furina
from furina.data.tasks import tasks
from furina.evaluation.evaluation import Engine
from furina.records import RecordError, RunRecord
from furina.reporting.read.changes import NUMERICS, Change, read_changes, stale_notes
from tests.records import fakes
from tests.reporting.frames import load_suite

ROOT = Path(__file__).parents[2]
HEADER = "date,area,what\n"
LINE = "2026-11-22T11:29:57+00:00,training,dropout draws gaps\n"


def change(area: str, date: str = "2026-11-20T10:00:01+00:00") -> Change:
    return Change(datetime.fromisoformat(date), area, "something")


def notes(record: RunRecord, *changes: Change) -> list[str]:
    return stale_notes(record, changes)


RECORD = fakes.run_record("furina", "arc_easy")
"""Started at 10:00 on 2026-11-20 UTC."""


def test_a_record_is_stale_if_the_change_came_after_its_start() -> None:
    assert notes(RECORD, change("training")) == ["made before: something"]
    assert notes(RECORD, change("training", "2026-11-20T10:00:00+00:00")) == []
    assert notes(RECORD, change("training", "2026-11-19T10:00:01+00:00")) == []


def test_a_change_while_a_run_was_going_on_makes_it_stale() -> None:
    assert RECORD.finished > "2026-11-20T10:05:00+00:00"
    assert notes(RECORD, change("training", "2026-11-20T10:05:00+00:00"))


def test_dates_are_compared_as_moments_and_not_as_texts() -> None:
    assert notes(RECORD, change("training", "2026-11-20T09:30:00-01:00"))
    assert not notes(RECORD, change("training", "2026-11-20T10:30:00+01:00"))


@pytest.mark.parametrize(
    "area, touched",
    [
        ("training", {"furina", "lora"}),
        ("training/furina", {"furina"}),
        ("training/dora", set()),
        ("data", {"furina", "lora", "base"}),
        ("data/arc_easy", {"furina", "lora", "base"}),
        ("data/gsm8k", set()),
        ("scoring", {"furina", "lora", "base"}),
        ("scoring/shared", {"furina", "lora", "base"}),
        ("scoring/generate", set()),
    ],
)
def test_a_change_touches_what_its_area_says(area: str, touched: set[str]) -> None:
    records = {
        method: fakes.run_record(method, "arc_easy") for method in ("base", "lora", "furina")
    }
    records["base"] = replace(records["base"], training=None)
    assert {name for name, record in records.items() if notes(record, change(area))} == touched


@pytest.mark.parametrize(
    "area, marked",
    [
        ("time", {"time/generation", "time/training"}),
        ("time/generation", {"time/generation"}),
        ("time/training", {"time/training"}),
        ("training", set()),
    ],
)
def test_a_change_of_times_marks_these_and_no_score(area: str, marked: set[str]) -> None:
    assert RECORD.latency and RECORD.training
    found = {
        wanted
        for wanted in ("time/generation", "time/training")
        if stale_notes(RECORD, (change(area),), (wanted,))
    }
    assert found == marked
    assert bool(notes(RECORD, change(area))) == (area == "training")
    untimed = replace(RECORD, latency=(), training=None)
    assert not stale_notes(untimed, (change(area),), ("time",))


def test_what_was_not_scored_is_not_touched_by_scoring() -> None:
    assert not notes(replace(RECORD, evaluations=()), change("scoring"))


def test_a_record_that_does_not_say_when_is_an_error() -> None:
    with pytest.raises(RecordError, match="furina--arc_easy: 'soon' is not an ISO 8601 date"):
        notes(replace(RECORD, started="soon"), change("training"))


def write(folder: Path, text: str) -> Path:
    path = folder / NUMERICS
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "must have lines under the header date,area,what"),
        (HEADER, "must have lines under the header date,area,what"),
        ("area,date,what\n" + LINE, "must have lines under the header"),
        (HEADER + "2026-11-22,training\n", "line 2 must have 3 columns"),
        (HEADER + LINE + "\n", "line 3 must have 3 columns"),
        (HEADER + '2026-11-22T11:29:57+00:00,training,"open\n', "is not CSV"),
        (HEADER + "yesterday,training,x\n", "line 2: 'yesterday' is not an ISO 8601 date"),
        (HEADER + "2026-11-22T11:29:57,training,x\n", "must say its time zone"),
        (HEADER + "2026-11-22T11:29:57+00:00,latency,x\n", "area 'latency' must be one of"),
        (HEADER + "2026-11-22T11:29:57+00:00,training/,x\n", "area 'training/' must be one of"),
        (HEADER + "2026-11-22T11:29:57+00:00,training, \n", "line 2 must say what has changed"),
        (HEADER + LINE + LINE, "holds one change twice"),
        (HEADER + LINE + "2026-11-21T00:00:00+00:00,data,y\n", "'y' must stand before"),
    ],
)
def test_a_damaged_file_of_changes_is_one_sentence(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=re.escape(message)):
        read_changes(write(tmp_path, text))


def test_a_suite_knows_the_changes_beside_it(folder: Path) -> None:
    assert load_suite(folder).changes == ()
    write(folder.parent, HEADER + LINE)
    (found,) = load_suite(folder).changes
    assert (found.area, found.what) == ("training", "dropout draws gaps")


def numerics_entries() -> list[str]:
    """Return the changelog's entries tagged **numerics**, each on one line."""
    entries = re.split(r"^- ", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    return [" ".join(entry.split()) for entry in entries[1:] if "**numerics**" in entry]


CHANGES = read_changes(ROOT / "results" / NUMERICS)


@pytest.mark.parametrize("entry", numerics_entries(), ids=lambda entry: entry[:40])
def test_every_entry_of_the_changelog_that_moves_numbers_has_a_date(entry: str) -> None:
    assert any(found.what in entry for found in CHANGES)


@pytest.mark.parametrize("what", dict.fromkeys(found.what for found in CHANGES))
def test_a_dated_change_is_words_of_such_an_entry(what: str) -> None:
    assert any(what in entry for entry in numerics_entries())


def test_a_dated_change_names_a_method_task_or_engine_that_exists() -> None:
    known = {"training": set(furina.methods()), "data": set(tasks())}
    known["scoring"] = {*get_args(Engine), "generate"}
    known["time"] = {"generation", "training"}
    parts = [found.area.split("/") for found in CHANGES if "/" in found.area]
    assert [(kind, part) for kind, part in parts if part not in known[kind]] == []
