"""Questions as lm-eval documents: the one place where its tasks get their prompts from.

lm-eval calls `load` for every task file in `tasks/`, whether it was started by `furina evaluate`
(which hands over its questions) or on its own:

    lm_eval run --model hf --model_args pretrained=FOLDER,softmax_dtype=float32 \
        --include_path furina/evaluation/tasks --tasks furina_arc_easy_text \
        --metadata '{"test_size": 500}'
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from furina.data.prompts import Prompt, PromptForm
from furina.data.questions import Question
from furina.data.sources import Source, load_questions
from furina.data.splits import test_subset

DELIMITER = " "
"""lm-eval's default between prompt and choice; acc_norm does not count it as a character."""


def load(
    task: str,
    form: PromptForm,
    questions: Sequence[Question] | None = None,
    test_size: int | None = None,
    test_seed: int = 0,
    data_source: Source = "auto",
    data_dir: str | None = None,
    **metadata: object,
) -> Any:
    """Return the documents of `task` in answer form `form` as a one-split DatasetDict.

    Without `questions` they are the test split's, or its seeded subset of `test_size`. lm-eval
    passes `task` and `form` from the task file and the rest from its --metadata, to which it adds
    entries of its own: `metadata` takes those.
    """
    from datasets import Dataset, DatasetDict

    if questions is None:
        whole = load_questions(task, "test", data_source, data_dir)
        _, questions = test_subset(whole, test_size, test_seed, task)
    prompt = Prompt(form)
    return DatasetDict({"test": Dataset.from_list([document(q, prompt) for q in questions])})


def document(question: Question, prompt: Prompt) -> dict[str, object]:
    """Return what lm-eval joins into `context + " " + choice`, byte for byte the prompt's text."""
    choices = [prompt.continuation(question, i) for i in range(len(question.choices))]
    assert all(choice.startswith(DELIMITER) and choice != DELIMITER for choice in choices)
    return {
        "id": question.id,
        "context": prompt.context(question),
        "choices": [choice.removeprefix(DELIMITER) for choice in choices],
        "answer": question.answer,
    }
