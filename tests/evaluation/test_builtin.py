from __future__ import annotations

import functools
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest

from furina.errors import ConfigurationError, DataError
from furina.evaluation.builtin import builtin

ROWS = [
    {
        "id": str(number),
        "question": f"What comes after {number}?",
        "choices": {"text": [str(number + i) for i in range(1, 5)], "label": list("ABCD")},
        "answerKey": "A",
    }
    for number in range(12)
]


@pytest.fixture(autouse=True)
def only_arc(monkeypatch):
    """Index one folder of lm-eval's tasks instead of all of them, which takes ten seconds."""
    folder = Path(lm_eval.tasks.__file__).parent / "arc"
    manager = functools.partial(
        lm_eval.tasks.TaskManager, include_defaults=False, include_path=str(folder)
    )
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)


@pytest.fixture
def hub(monkeypatch):
    """A hub that has the data."""
    splits = {split: datasets.Dataset.from_list(ROWS) for split in ("train", "validation", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict(splits))


def test_lm_evals_own_tasks_score_the_live_model(hub, model, tokenizer):
    scores = builtin(model, tokenizer, ["arc_easy"], batch_size=4, limit=8)
    assert [(score.task, score.metric, score.n) for score in scores] == [
        ("arc_easy", "acc", 8),
        ("arc_easy", "acc_norm", 8),
    ]
    assert all(0 <= score.value <= 1 and score.version == "1.0" for score in scores)


def test_a_tag_is_all_of_its_tasks(hub, model, tokenizer):
    scores = builtin(model, tokenizer, ["ai2_arc"], limit=2)
    assert {score.task for score in scores} == {"arc_easy", "arc_challenge"}


def test_examples_are_put_before_the_question(hub, model, tokenizer):
    longest: list[int] = []
    model.register_forward_pre_hook(lambda _, args: longest.append(args[0].shape[1]))
    builtin(model, tokenizer, ["arc_easy"], limit=2)
    bare = max(longest)
    longest.clear()
    builtin(model, tokenizer, ["arc_easy"], limit=2, num_fewshot=2)
    assert max(longest) > 2 * bare


def test_an_unknown_task_suggests_the_nearest(model, tokenizer):
    with pytest.raises(ConfigurationError, match="Did you mean 'arc_easy'"):
        builtin(model, tokenizer, ["arc_eazy"])


def test_no_data_is_one_sentence(monkeypatch, model, tokenizer):
    def unreachable(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"arc_easy cannot be loaded \(ConnectionError\)"):
        builtin(model, tokenizer, ["arc_easy"])
