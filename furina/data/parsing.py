"""Turn rows into items: checked access to fields, and the row formats that benchmarks share.

A field of the wrong type is a ValueError that says what it is. Nothing is converted that could be
something else: a null is not "None", a text is no list of letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from furina.data.items import Problem, Question, content_id

Row = Mapping[str, Any]

_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)


def value(row: Row, name: str) -> Any:
    """Return the field `name`, whatever its type."""
    if not isinstance(row, Mapping):
        raise ValueError(f"it is {_shown(row)} and no object with named fields")
    if name not in row:
        raise ValueError(f"it has no field {name!r}")
    return row[name]


def text(row: Row, name: str) -> str:
    """Return a text; whether it may be blank is up to the item that it becomes."""
    found = value(row, name)
    if not isinstance(found, str):
        raise ValueError(f"{name!r} is {_shown(found)} and no text")
    return found


def texts(row: Row, name: str, count: int | None = None) -> tuple[str, ...]:
    """Return a list of texts, of which there must be `count` if that is given."""
    found = value(row, name)
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise ValueError(f"{name!r} is {_shown(found)} and no list of texts")
    if count not in (None, len(found)):
        raise ValueError(f"{name!r} has {len(found)} texts, not {count}")
    return tuple(found)


def index(row: Row, name: str, first: int = 0) -> int:
    """Return a choice's index, counted from 0, where the source counts from `first`."""
    found = value(row, name)
    is_digits = isinstance(found, str) and re.fullmatch("[0-9]+", found)
    if isinstance(found, bool) or not (isinstance(found, int) or is_digits):
        raise ValueError(f"{name!r} is {_shown(found)} and no whole number")
    if (number := int(found) - first) < 0:
        raise ValueError(f"{name!r} is {_shown(found)} and counts from {first}")
    return number


def label_index(label: str, labels: Iterable[str]) -> int:
    """Return the index of `label` among labels, no two of which may be equal."""
    labels = list(labels)  # "BC" is in a text ABCD, and none of its letters
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels {', '.join(labels)} repeat one")
    if label not in labels:
        raise ValueError(f"the answer {label!r} is none of the labels {', '.join(labels)}")
    return labels.index(label)


def number_text(number: object) -> str:
    """Return a number as the text it is compared by: no thousands' commas, no trailing ".0".

    Raises:
        ValueError: it is no finite number, or has a comma that parts no thousands.
    """
    written = "" if isinstance(number, bool) else str(number).strip()
    if not _NUMBER.fullmatch(written):
        raise ValueError(f"{_shown(number)} is no number")
    return re.sub(r"\.0+$", "", written.replace(",", ""))


def _shown(found: object) -> str:
    shown = repr(found)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"


def labelled_row(row: Row, stem_field: str = "question") -> Question:
    """Read a row in the public format: `choices` with `text` and `label` lists, and `answerKey`.

    Labels may be letters or digits; the answer is the position of `answerKey` among them.
    """
    columns = value(row, "choices")
    labels = texts(columns, "label")
    return Question(
        id=text(row, "id"),
        stem=text(row, stem_field),
        choices=texts(columns, "text", len(labels)),
        answer=label_index(text(row, "answerKey"), labels),
    )


def to_labelled_row(question: Question, stem_field: str = "question") -> Row:
    """Return the row that `labelled_row` reads, labels being letters."""
    return {
        "id": question.id,
        stem_field: question.stem,
        "choices": {"text": list(question.choices), "label": list(question.letters)},
        "answerKey": question.letters[question.answer],
    }


def olmes_row(row: Row) -> Question:
    """Read a row of an evaluation request: `query` (prompt text), `choices` and `gold` index."""
    return Question(
        id=text(row, "id"),
        stem=unframed(text(row, "query"), "Question: "),
        choices=texts(row, "choices"),
        answer=index(row, "gold"),
    )


def unframed(query: str, prefix: str, suffix: str = "\nAnswer:") -> str:
    """Strip the frame of a request's prompt; raise ValueError if it has another."""
    if not (query.startswith(prefix) and query.endswith(suffix)):
        raise ValueError(f"query {query[:40]!r} is not '{prefix}…{suffix.strip()}'")
    return query.removeprefix(prefix).removesuffix(suffix)


def nameless(stem: str, choices: Iterable[str], answer: int, context: str = "") -> Question:
    """Return a question whose source gives no id; its texts make one."""
    choices = tuple(choices)
    texts = [context] if context else []
    return Question(content_id(*texts, stem, *choices), stem, choices, answer, context)


def worked_problem(question: str, answer: str, solution: str = "") -> Problem:
    """Return a problem whose source gives no id; its text makes one."""
    return Problem(content_id(question), question, solution, answer)


def instruction_row(row: Row) -> Problem:
    """Read a row of LLM-Adapters' arithmetic sets; its `output` is a model's, not a solution."""
    return worked_problem(text(row, "instruction"), number_text(value(row, "answer")))
