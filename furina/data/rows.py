"""Readers of the row formats that several benchmarks share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from furina.data.extraction import last_boxed
from furina.data.items import Problem, Question, content_id

Row = Mapping[str, Any]


def labelled_row(row: Row, stem_field: str) -> Question:
    """Read a row in the public format: `choices` with `text` and `label` lists, and `answerKey`.

    Labels may be letters or digits; the answer is the position of `answerKey` among them.
    """
    choices = row["choices"]
    return Question(
        id=row["id"],
        stem=row[stem_field],
        choices=tuple(choices["text"]),
        answer=list(choices["label"]).index(row["answerKey"]),
    )


def olmes_row(row: Row) -> Question:
    """Read a row of an evaluation request: `query` (prompt text), `choices` and `gold` index."""
    return Question(
        id=row["id"],
        stem=unframed(row["query"], "Question: "),
        choices=tuple(row["choices"]),
        answer=row["gold"],
    )


def unframed(query: str, prefix: str, suffix: str = "\nAnswer:") -> str:
    """Return what a request asks; raises ValueError where the prompt's frame is another."""
    if not (query.startswith(prefix) and query.endswith(suffix)):
        raise ValueError(f"query {query[:40]!r} is not '{prefix}…{suffix.strip()}'")
    return query.removeprefix(prefix).removesuffix(suffix)


def nameless(stem: str, choices: Iterable[str], answer: int, context: str = "") -> Question:
    """Return a question whose source gives no id: named by its texts."""
    choices = tuple(choices)
    texts = [context] if context else []
    return Question(content_id(*texts, stem, *choices), stem, choices, answer, context)


def labelled_columns(question: Question, stem_field: str) -> Row:
    """Return the row that `labelled_row` reads, labels being letters."""
    return {
        "id": question.id,
        stem_field: question.stem,
        "choices": {"text": list(question.choices), "label": list(question.letters)},
        "answerKey": question.letters[question.answer],
    }


def number_text(value: object) -> str:
    """Return a number as the text it is compared by: no thousands' commas, no trailing ".0".

    Raises:
        ValueError: it is no number.
    """
    text = re.sub(r"\.0+$", "", str(value).strip().replace(",", ""))
    float(text)
    return text


def worked_problem(question: str, answer: str, solution: str = "") -> Problem:
    """Return a problem whose source gives no id: named by its text."""
    return Problem(content_id(question), question, solution, answer)


def instruction_row(row: Row) -> Problem:
    """Read a row of LLM-Adapters' arithmetic sets; its `output` is a model's, not a solution."""
    return worked_problem(row["instruction"], number_text(row["answer"]))


def boxed_row(row: Row) -> Problem:
    r"""Read a row of MATH: the answer is what its solution has in the last \boxed.

    The `answer` that some sources add has lost spaces and commas ("3, 5, 7" as "357"), so it is
    not read.
    """
    answer = last_boxed(row["solution"])
    if answer is None:
        raise ValueError(f"no \\boxed answer in {row['solution'][:40]!r}")
    return worked_problem(row["problem"], answer, row["solution"])
