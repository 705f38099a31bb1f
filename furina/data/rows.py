"""Readers of the row formats that several benchmarks share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from furina.data.questions import Question

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
    prefix, suffix = "Question: ", "\nAnswer:"
    query = row["query"]
    if not (query.startswith(prefix) and query.endswith(suffix)):
        raise ValueError(f"query {query[:40]!r} is not 'Question: … Answer:'")
    return Question(
        id=row["id"],
        stem=query.removeprefix(prefix).removesuffix(suffix),
        choices=tuple(row["choices"]),
        answer=row["gold"],
    )
