"""A cell is stored once, under the hash of its record, and each suite lists it by its own names."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RecordError, RunRecord
from furina.records.cells import publish, suite_activity, suite_cells, suite_records
from tests.records import fakes
from tests.records.fake_activity import activity_record

BASE = fakes.run_record("base", "arc_easy")
FURINA = fakes.run_record("furina", "arc_easy")


def run_folder(tmp_path: Path, record: RunRecord = FURINA) -> Path:
    fakes.write_run(tmp_path / "run", record)
    return tmp_path / "run"


def files(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_two_suites_store_a_cell_once_and_each_reads_its_own_names(tmp_path: Path) -> None:
    results, run = tmp_path / "results", run_folder(tmp_path)
    first = publish(FURINA, results, "one", "furina", "furina run one", run)
    second = publish(FURINA, results, "two", "best", "furina run two", run)
    digest = hashlib.sha256(first.read_bytes()).hexdigest()[:8]
    assert first == second == results / f"cells/furina--arc_easy--seed0-{digest}/record.json"
    assert RunRecord.read(first) == FURINA
    ((file, one),) = suite_records(results / "one")
    assert file == first and one.config["row"] == ""
    assert (one.suite, one.row, one.name) == ("one", "furina", "furina--arc_easy--seed0")
    ((_, two),) = suite_records(results / "two")
    assert (two.suite, two.row, two.command) == ("two", "best", "furina run two")
    assert two.config["suite"] == "two" and two.file_name == "best--arc_easy--seed0.json"
    assert replace(two, suite="", name="", config={}, command="") == replace(
        FURINA, suite="", name="", config={}, command=""
    )
    for score in two.evaluations:
        assert (first.parent / str(score.samples)).read_bytes()


def test_one_suite_may_have_a_cell_in_two_rows(tmp_path: Path) -> None:
    for row in ("alpha-0.1", "shared-1"):
        publish(FURINA, tmp_path, "curves", row, "furina run curves", run_folder(tmp_path))
    found = suite_records(tmp_path / "curves")
    assert [record.row for _, record in found] == ["alpha-0.1", "shared-1"]
    assert len({file for file, _ in found}) == 1


def test_what_a_suite_lists_no_more_is_deleted_unless_another_lists_it(tmp_path: Path) -> None:
    later = replace(FURINA, started="2027-01-01T00:00:00+00:00")
    old = publish(FURINA, tmp_path, "one", "furina", "")
    publish(FURINA, tmp_path, "two", "furina", "")
    new = publish(later, tmp_path, "one", "furina", "")
    assert old.exists() and [cell.file for cell in suite_cells(tmp_path / "one")] == [new]
    assert publish(later, tmp_path, "two", "furina", "") == new
    assert new.exists() and not old.parent.exists()


def test_nothing_is_deleted_while_a_list_cannot_be_read(tmp_path: Path) -> None:
    old = publish(FURINA, tmp_path, "one", "furina", "")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "cells.json").write_text("{")
    later = replace(FURINA, started="2027-01-01T00:00:00+00:00")
    publish(later, tmp_path, "one", "furina", "")
    assert old.exists()
    with pytest.raises(RecordError, match=r"two/cells.json is not valid JSON"):
        suite_cells(tmp_path / "two")


def test_what_is_published_again_is_whole_again(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    file = publish(FURINA, tmp_path, "one", "furina", "", run)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    sample = file.parent / str(FURINA.evaluations[0].samples)
    sample.write_bytes(b"damaged")
    sample.with_name(f".{sample.name}.left").write_bytes(b"by a killed writer")
    publish(FURINA, tmp_path, "one", "furina", "", run)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_records_in_a_suites_own_folder_count_until_they_are_published_anew(tmp_path: Path) -> None:
    publish(BASE, tmp_path, "one", "base", "")
    fakes.write_run(tmp_path / "one", FURINA)
    names = [cell.name for cell in suite_cells(tmp_path / "one")]
    assert names == ["base--arc_easy--seed0", "furina--arc_easy--seed0"]
    assert suite_records(tmp_path / "one")[1] == (tmp_path / "one" / FURINA.file_name, FURINA)
    file = publish(FURINA, tmp_path, "one", "furina", "")
    assert [cell.file for cell in suite_cells(tmp_path / "one")][1] == file


def test_activity_bears_the_names_of_the_suite(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    replace(activity_record(), suite="", task="", seed=None).write(run / "activity.json")
    publish(FURINA, tmp_path, "one", "best", "furina run one", run)
    publish(BASE, tmp_path, "one", "base", "")
    ((name, record),) = suite_activity(tmp_path / "one").items()
    assert name == tmp_path / "one" / "best--arc_easy--seed0.json"
    assert (record.suite, record.row, record.task, record.seed) == ("one", "best", "arc_easy", 0)
    assert record.command == "furina run one"


def test_writers_at_the_same_time_lose_no_line(tmp_path: Path) -> None:
    rows = [f"row{number}" for number in range(8)]
    threads = [
        threading.Thread(target=publish, args=(FURINA, tmp_path, "one", row, "")) for row in rows
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record.row for _, record in suite_records(tmp_path / "one")] == rows


def test_a_listed_cell_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = publish(FURINA, tmp_path, "one", "furina", "")
    file.unlink()
    with pytest.raises(RecordError, match="there is no such record") as caught:
        suite_records(tmp_path / "one")
    assert str(file) in str(caught.value)
