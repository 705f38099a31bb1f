"""The task files, as lm-eval itself loads them."""

from __future__ import annotations

from typing import Any

import pytest

from furina.data.protocols import ChoiceProtocol, get_protocol, protocols
from furina.data.splits import test_subset as named_subset
from furina.data.tasks import get_task
from furina.evaluation.choices import TASKS

CHOICE = sorted(name for name, p in protocols().items() if isinstance(p, ChoiceProtocol))
ARC = {"benchmark": "arc_easy"}


def lm_eval_task(protocol: str, metadata: dict[str, Any]) -> Any:
    from lm_eval.tasks import TaskManager

    name = f"furina_{protocol}"
    metadata = {**ARC, **metadata}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def requests(task: Any) -> list[tuple[str, str]]:
    task.build_all_requests()
    return [instance.args for instance in task.instances]


def test_every_protocol_of_choices_has_a_task_file_and_no_other_has():
    names = {f"furina_{protocol}.yaml" for protocol in CHOICE}
    assert {path.name for path in TASKS.glob("[!_]*.yaml")} == names


@pytest.mark.parametrize("name", CHOICE)
def test_lm_evals_requests_are_the_prompts_byte_for_byte(name, questions):
    protocol, task = get_protocol(name), get_task("arc_easy")
    assert requests(lm_eval_task(name, {"questions": questions})) == [
        (protocol.context(task, question), answer)
        for question in questions
        for answer in protocol.answers(task, question)
    ]


@pytest.mark.parametrize("name", CHOICE)
def test_lm_eval_alone_reads_the_same_documents_from_the_data_folder(name, questions, data_dir):
    alone = lm_eval_task(name, {"data_dir": str(data_dir), "pretrained": "what lm-eval adds"})
    assert requests(alone) == requests(lm_eval_task(name, {"questions": questions}))


def test_lm_eval_alone_can_take_the_named_subset(questions, data_dir):
    alone = lm_eval_task("text", {"data_dir": str(data_dir), "test_size": 4, "test_seed": 3})
    _, subset = named_subset(questions, 4, 3)
    assert [document["id"] for document in alone.eval_docs] == [question.id for question in subset]


@pytest.mark.parametrize("name", CHOICE)
def test_versions_and_metrics_in_the_task_files_are_the_protocols(name, questions):
    task, protocol = lm_eval_task(name, {"questions": questions}), get_protocol(name)
    assert tuple(task.aggregation()) == protocol.metrics
    assert protocol.version == task.VERSION
