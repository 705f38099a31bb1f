"""Readers of the row formats that several benchmarks share."""

from __future__ import annotations

from collections.abc import Iterable

from furina.data.cells import Row, cell, index, number_text, place, text, texts
from furina.data.extraction import last_boxed
from furina.data.items import Problem, Question, content_id


def labelled_row(row: Row, stem_field: str) -> Question:
    """Read a row in the public format: `choices` with `text` and `label` lists, and `answerKey`.

    Labels may be letters or digits; the answer is the position of `answerKey` among them.
    """
    columns = cell(row, "choices")
    labels = texts(columns, "label")
    return Question(
        id=text(row, "id"),
        stem=text(row, stem_field),
        choices=texts(columns, "text", len(labels)),
        answer=place(text(row, "answerKey"), labels),
    )


def olmes_row(row: Row) -> Question:
    """Read a row of an evaluation request: `query` (prompt text), `choices` and `gold` index."""
    return Question(
        id=text(row, "id"),
        stem=unframed(text(row, "query"), "Question: "),
        choices=texts(row, "choices"),
        answer=index(row, "gold"),
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


def worked_problem(question: str, answer: str, solution: str = "") -> Problem:
    """Return a problem whose source gives no id: named by its text."""
    return Problem(content_id(question), question, solution, answer)


def instruction_row(row: Row) -> Problem:
    """Read a row of LLM-Adapters' arithmetic sets; its `output` is a model's, not a solution."""
    return worked_problem(text(row, "instruction"), number_text(cell(row, "answer")))


def boxed_row(row: Row) -> Problem:
    r"""Read a row of MATH: the answer is what its solution has in the last \boxed.

    The `answer` that some sources add has lost spaces and commas ("3, 5, 7" as "357"), so it is
    not read.
    """
    solution = text(row, "solution")
    answer = last_boxed(solution)
    if answer is None:
        raise ValueError(f"no \\boxed answer in {solution[:40]!r}")
    return worked_problem(text(row, "problem"), answer, solution)
