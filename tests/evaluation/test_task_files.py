"""The task files, as lm-eval itself loads them."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from furina.data.prompts import Prompt, PromptForm
from furina.data.splits import test_subset as named_subset
from furina.data.tasks import tasks
from furina.errors import ConfigurationError
from furina.evaluation.harness import TASKS, task_name

FORMS = get_args(PromptForm)


def lm_eval_task(name: str, metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def requests(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", sorted(tasks()))
def test_every_task_can_be_scored_in_every_form(task, form, questions):
    loaded = lm_eval_task(task_name(task, form), {"questions": questions})
    assert loaded.config.dataset_kwargs == {"task": task, "form": form}


def test_there_is_no_task_file_without_a_task():
    names = {f"{task}_{form}.yaml" for task in tasks() for form in FORMS}
    assert {path.name for path in TASKS.glob("[!_]*.yaml")} == names


@pytest.mark.parametrize("form", FORMS)
def test_lm_evals_requests_are_the_prompts_byte_for_byte(form, questions):
    prompt = Prompt(form)
    assert requests(lm_eval_task(f"furina_arc_easy_{form}", {"questions": questions})) == [
        (prompt.context(question), prompt.continuation(question, i))
        for question in questions
        for i in range(len(question.choices))
    ]


@pytest.mark.parametrize("form", FORMS)
def test_lm_eval_alone_reads_the_same_documents_from_the_data_folder(form, questions, data_dir):
    name = f"furina_arc_easy_{form}"
    alone = lm_eval_task(name, {"data_dir": str(data_dir), "pretrained": "what lm-eval adds"})
    assert requests(alone) == requests(lm_eval_task(name, {"questions": questions}))


def test_lm_eval_alone_can_take_the_named_subset(questions, data_dir):
    metadata = {"data_dir": str(data_dir), "test_size": 4, "test_seed": 3}
    alone = lm_eval_task("furina_arc_easy_text", metadata)
    _, subset = named_subset(questions, 4, 3)
    assert [document["id"] for document in alone.eval_docs] == [question.id for question in subset]


def test_versions_and_metrics_are_in_the_task_files(questions):
    text = lm_eval_task("furina_arc_easy_text", {"questions": questions})
    letter = lm_eval_task("furina_arc_easy_letter", {"questions": questions})
    assert list(text.aggregation()) == ["acc", "acc_norm"]
    assert list(letter.aggregation()) == ["acc"]
    assert text.VERSION == letter.VERSION == 1.0


@pytest.mark.parametrize(("task", "form"), [("arc_eazy", "text"), ("arc_easy", "txt")])
def test_an_unknown_task_or_form_suggests_the_nearest(task, form):
    with pytest.raises(ConfigurationError, match="Did you mean 'arc_easy_text'"):
        task_name(task, form)
