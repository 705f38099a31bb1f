"""Every task is one file that says everything, and reads both row formats."""

from __future__ import annotations

from pathlib import Path

import pytest

import furina.data
from furina.data.rows import labelled_row, olmes_row
from furina.data.tasks import get_task, tasks
from furina.errors import ConfigurationError


def test_every_file_of_the_folder_is_a_task_of_its_name():
    files = {path.stem for path in (Path(furina.data.__file__).parent / "tasks").glob("*.py")}
    assert set(tasks()) == files - {"__init__", "base"}
    assert {"arc_easy", "openbookqa"} <= set(tasks())


@pytest.mark.parametrize("name", sorted(tasks()))
def test_a_task_states_its_title_licence_and_sources(name):
    task = get_task(name)
    assert task.name == name
    assert all([task.title, task.licence, *task.hub, task.wheel, task.folder])


def test_an_unknown_task_suggests_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no task 'arc-easy'. Did you mean 'arc_easy'"):
        get_task("arc-easy")


@pytest.mark.parametrize(
    ("labels", "key", "answer"),
    [("ABCD", "B", 1), ("1234", "4", 3), ("ABCDE", "E", 4), ("ABC", "A", 0)],
)
def test_the_answer_is_the_place_of_its_label(labels, key, answer):
    choices = {"text": [f"choice {label}" for label in labels], "label": list(labels)}
    row = {"id": "1", "stem": "What?", "choices": choices, "answerKey": key}
    question = labelled_row(row, "stem")
    assert (question.answer, question.stem) == (answer, "What?")
    assert question.letters == tuple("ABCDE"[: len(labels)])


def test_a_key_that_is_no_label_is_an_error():
    row = {"id": "1", "stem": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}}
    with pytest.raises(ValueError, match="'1' is not in list"):
        labelled_row({**row, "answerKey": "1"}, "stem")


def test_only_the_frame_of_a_request_is_taken_off_the_question():
    query = "Question: Is 'Question: x\nAnswer:' a prompt?\nAnswer:"
    row = {"id": "1", "query": query, "choices": ["yes", "no"], "gold": 0}
    assert olmes_row(row).stem == "Is 'Question: x\nAnswer:' a prompt?"


def test_a_bare_request_is_an_error():
    with pytest.raises(ValueError, match="is not 'Question"):
        olmes_row({"id": "1", "query": "Answer:", "choices": ["a", "b"], "gold": 0})
