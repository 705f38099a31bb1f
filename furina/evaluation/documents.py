"""Questions as lm-eval documents: the one place where its tasks get their prompts from.

lm-eval calls `load` for every task file in `tasks/`, whether it was started by `furina evaluate`
(which hands over its questions) or on its own:

    lm_eval run --model hf --model_args pretrained=FOLDER,softmax_dtype=float32 \
        --include_path furina/evaluation/tasks --tasks furina_text \
        --metadata '{"benchmark": "arc_easy", "test_size": 500}'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from furina.data.items import Question
from furina.data.protocols import ChoiceProtocol, get_protocol
from furina.data.sources import Source, load_items
from furina.data.splits import test_subset
from furina.data.tasks import Task, get_task

DELIMITER = " "
"""lm-eval's default between prompt and choice; acc_norm does not count it as a character."""


def load(
    protocol: str,
    benchmark: str,
    questions: Sequence[Question] | None = None,
    test_size: int | None = None,
    test_seed: int = 0,
    data_source: Source = "auto",
    data_dir: str | None = None,
    **metadata: object,
) -> Any:
    """Return the documents of task `benchmark` under `protocol` as a one-split DatasetDict.

    Without `questions` they are the test split's, or its seeded subset of `test_size`. lm-eval
    passes `protocol` from the task file and the rest from its --metadata, to which it adds entries
    of its own: `metadata` takes those.
    """
    from datasets import Dataset, DatasetDict

    task, asked = get_task(benchmark), get_protocol(protocol)
    assert isinstance(asked, ChoiceProtocol)
    asked.require(task)
    if questions is None:
        whole = load_items(benchmark, "test", data_source, data_dir)
        _, subset = test_subset(whole, test_size, test_seed, benchmark)
        questions = [item for item in subset if isinstance(item, Question)]
    documents = [document(task, question, asked) for question in questions]
    return DatasetDict({"test": Dataset.from_list(documents)})


def document(task: Task, question: Question, protocol: ChoiceProtocol) -> dict[str, object]:
    """Return what lm-eval joins into `context + " " + choice`, byte for byte the prompt's text."""
    choices = protocol.answers(task, question)
    assert all(choice.startswith(DELIMITER) and choice != DELIMITER for choice in choices)
    return {
        "id": question.id,
        "context": protocol.context(task, question),
        "choices": [choice.removeprefix(DELIMITER) for choice in choices],
        "answer": protocol.right(task, question),
    }
