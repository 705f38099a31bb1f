from __future__ import annotations

import functools
import socket
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest

from furina.errors import ConfigurationError, DataError
from furina.evaluation.builtin import builtin, score_builtin
from furina.evaluation.independence import check_causal

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
    check_causal(model)
    longest: list[int] = []
    model.register_forward_pre_hook(lambda _, args: longest.append(args[0].shape[1]))
    builtin(model, tokenizer, ["arc_easy"], limit=2, engine="lm_eval")
    bare = max(longest)
    longest.clear()
    builtin(model, tokenizer, ["arc_easy"], limit=2, num_fewshot=2, engine="lm_eval")
    assert max(longest) > 2 * bare


def test_an_unknown_task_suggests_the_nearest(model, tokenizer):
    with pytest.raises(ConfigurationError, match="Did you mean 'arc_easy'"):
        builtin(model, tokenizer, ["arc_eazy"])


def test_no_data_is_one_sentence(monkeypatch, model, tokenizer):
    def unreachable(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"arc_easy cannot be loaded \(ConnectionError: no route\)"):
        builtin(model, tokenizer, ["arc_easy"])


def refuse(*_, **__):
    raise AssertionError("tried to connect")


@pytest.fixture
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets, "load_dataset", refuse)


def test_given_rows_need_no_hub_and_change_nothing_else(hub, model, tokenizer, monkeypatch):
    theirs = builtin(model, tokenizer, ["arc_easy"], engine="lm_eval")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    ours = builtin(model, tokenizer, ["arc_easy"], engine="lm_eval", rows={"arc_easy": ROWS})
    assert ours == theirs


def test_the_engine_does_not_change_what_is_predicted(no_hub, model, tokenizer):
    rows = {"arc_easy": ROWS}
    (ours, *_), (theirs, *_) = (
        builtin(model, tokenizer, ["arc_easy"], rows=rows, engine=engine)
        for engine in ("shared", "lm_eval")
    )
    assert ours.n == len(ours.samples) == len(ROWS)
    for one, other in zip(ours.samples, theirs.samples, strict=True):
        assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-3)
        assert (one.prediction, one.target) == (other.prediction, other.target)


def test_samples_are_the_questions_in_order_and_give_the_score(no_hub, model, tokenizer):
    score, _ = builtin(model, tokenizer, ["arc_easy"], rows={"arc_easy": ROWS})
    assert [sample.doc_id for sample in score.samples] == list(range(len(ROWS)))
    for sample, row in zip(score.samples, ROWS, strict=True):
        assert sample.prompts == (f"Question: {row['question']}\nAnswer:",) * 4
        assert sample.answers == tuple(f" {text}" for text in row["choices"]["text"])
        assert sample.correct["acc"] == (sample.prediction == 0)
    assert score.value == sum(sample.correct["acc"] for sample in score.samples) / score.n


FILLED = [
    {"sentence": f"Ann met Bob, so _ said {n}.", "option1": "Ann", "option2": "Bob", "answer": "1"}
    for n in range(4)
]
ENDED = [
    {
        "activity_label": "Baking",
        "ctx_a": "A man bakes [title] bread.",
        "ctx_b": "he",
        "endings": [f"waits {n} hours.", "sings.", "eats it.", "leaves."],
        "label": "0",
    }
    for n in range(4)
]


@pytest.mark.parametrize(
    ("name", "rows", "prompt"),
    [
        ("winogrande", FILLED, "Ann met Bob, so Ann"),
        ("hellaswag", ENDED, "Baking: A man bakes. bread. He"),
    ],
)
def test_functions_of_the_tasks_own_file_still_run(
    name, rows, prompt, no_hub, model, tokenizer, monkeypatch
):
    folder = Path(lm_eval.tasks.__file__).parent / name
    manager = functools.partial(
        lm_eval.tasks.TaskManager.func, include_defaults=False, include_path=str(folder)
    )
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    score, *_ = builtin(model, tokenizer, [name], rows={name: rows})
    assert (score.n, score.version, score.samples[0].prompts[0]) == (4, "1.0", prompt)


def test_rows_that_cannot_be_used_are_one_sentence(no_hub, model, tokenizer):
    with pytest.raises(DataError, match="no rows for lm-eval's task arc_easy"):
        builtin(model, tokenizer, ["arc_easy"], rows={"arc_easy": []})
    with pytest.raises(ConfigurationError, match="wants 2 examples"):
        builtin(model, tokenizer, ["arc_easy"], rows={"arc_easy": ROWS}, num_fewshot=2)
    with pytest.raises(ConfigurationError, match="Did you mean 'arc_easy'"):
        builtin(model, tokenizer, ["arc_easy"], rows={"arc_eazy": ROWS})


def test_a_task_of_ours_is_scored_by_lm_evals(no_hub, model, tokenizer, questions):
    from furina.data.tasks import get_task

    task = get_task("arc_easy")
    found = score_builtin(model, tokenizer, task, questions, batch_size=4, engine="shared")
    assert (found.protocol, found.protocol_version) == ("lm_eval", "1.0")
    assert [sample.id for sample in found.samples] == [question.id for question in questions]
    assert set(found.scores) == {"acc", "acc_norm"} and found.truncated == 0
    assert found.first_prompt.text == f"Question: {questions[0].stem}\nAnswer:"
    assert list(found.first_prompt.ids) == tokenizer.encode(found.first_prompt.text)
    for sample, question in zip(found.samples, questions, strict=True):
        assert sample.answer == question.answer
        assert sample.lengths == tuple(map(len, question.choices))
        assert sample.correct["acc"] == (sample.prediction["acc"] == question.answer)
