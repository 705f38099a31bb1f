"""One multiple-choice question, and what can be told of a list of them without a model."""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from furina.errors import DataError


@dataclass(frozen=True)
class Question:
    """A stem, its choices in order, and the index of the right one.

    Raises:
        DataError: fewer than two choices, or `answer` is not the index of one.
    """

    id: str
    stem: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self) -> None:
        """Refuse a question that cannot be asked or scored."""
        count = len(self.choices)
        if not (2 <= count <= len(string.ascii_uppercase) and 0 <= self.answer < count):
            raise DataError(f"Question {self.id!r} has {count} choices and answer {self.answer}.")

    @property
    def letters(self) -> tuple[str, ...]:
        """Name the choices A, B, C, … whatever labels the source used."""
        return tuple(string.ascii_uppercase[: len(self.choices)])

    @property
    def normalised(self) -> str:
        """Return the stem without case and spacing: equal for the same question asked twice."""
        return " ".join(self.stem.casefold().split())


def data_hash(questions: Iterable[Question]) -> str:
    """Return the sha256 over every field of every question, in order."""
    digest = hashlib.sha256()
    for question in questions:
        fields = [question.id, question.stem, question.choices, question.answer]
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()


def overlap(questions: Iterable[Question], others: Iterable[Question]) -> list[Question]:
    """List those of `questions` whose normalised stem also stands in `others`."""
    known = {other.normalised for other in others}
    return [question for question in questions if question.normalised in known]


def chance_level(questions: Sequence[Question]) -> float:
    """Return the expected accuracy of guessing: the mean of 1 / number of choices."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)
