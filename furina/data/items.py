"""What the benchmarks are made of, and what can be told of a list of items without a model."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from furina.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")


def _check(name: str, field: str, text: object, may_be_blank: bool = False) -> None:
    """Refuse what no model can read: other than text, nothing but spaces, half a character."""
    if not isinstance(text, str):
        raise DataError(f"Item {name!r} has a {field} that is {text!r} and no text.")
    if not (may_be_blank or text.strip()):
        raise DataError(f"Item {name!r} has a blank {field}: there is nothing to read or to score.")
    if not text.isascii() and _SURROGATE.search(text):
        raise DataError(f"Item {name!r} has a {field} with half of a surrogate pair in it.")


@dataclass(frozen=True)
class Question:
    """A multiple-choice question: a stem, its choices in order, and the index of the right one.

    `context` is what the stem is asked about (BoolQ's passage), empty where there is none.

    Raises:
        DataError: fewer than two choices, a blank or undecodable text, or `answer` is not the index
            of a choice.
    """

    id: str
    stem: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""

    def __post_init__(self) -> None:
        """Refuse a question that cannot be asked or scored."""
        _check(self.id, "id", self.id)
        _check(self.id, "stem", self.stem)
        _check(self.id, "context", self.context, may_be_blank=True)
        for choice in self.choices:
            _check(self.id, "choice", choice)
        count = len(self.choices)
        if not (2 <= count <= len(string.ascii_uppercase) and 0 <= self.answer < count):
            raise DataError(f"Question {self.id!r} has {count} choices and answer {self.answer}.")

    @property
    def letters(self) -> tuple[str, ...]:
        """Name the choices A, B, C, … whatever labels the source used."""
        return tuple(string.ascii_uppercase[: len(self.choices)])

    @property
    def asked(self) -> str:
        """Return the text that is asked."""
        return f"{self.context}\n{self.stem}" if self.context else self.stem

    @property
    def fields(self) -> list[object]:
        """Return everything that decides the item, for hashes."""
        context = [self.context] if self.context else []
        return [self.id, self.stem, self.choices, self.answer, *context]


@dataclass(frozen=True)
class Problem:
    """A mathematical problem, worked out in `solution` (empty where the source has none).

    `answer` is the final answer as text: a number, a letter (AQuA) or LaTeX (MATH).
    """

    id: str
    question: str
    solution: str
    answer: str

    def __post_init__(self) -> None:
        """Refuse what cannot be asked or judged."""
        _check(self.id, "id", self.id)
        _check(self.id, "question", self.question)
        _check(self.id, "solution", self.solution, may_be_blank=True)
        _check(self.id, "answer", self.answer)

    @property
    def asked(self) -> str:
        """Return the text that is asked."""
        return self.question

    @property
    def fields(self) -> list[object]:
        """Return everything that decides the item, for hashes."""
        return [self.id, self.question, self.solution, self.answer]


@dataclass(frozen=True)
class Program:
    """A function to be written: its head and docstring, and the tests of its body.

    `tests` defines `check(candidate)`, `solution` is a body that passes.
    """

    id: str
    prompt: str
    entry_point: str
    tests: str
    solution: str

    def __post_init__(self) -> None:
        """Refuse what cannot be asked or run."""
        for field in ("id", "prompt", "entry_point"):
            _check(self.id, field, getattr(self, field))
        for field in ("tests", "solution"):
            _check(self.id, field, getattr(self, field), may_be_blank=True)

    @property
    def asked(self) -> str:
        """Return the text that is asked."""
        return self.prompt

    @property
    def fields(self) -> list[object]:
        """Return everything that decides the item, for hashes."""
        return [self.id, self.prompt, self.entry_point, self.tests, self.solution]


@dataclass(frozen=True)
class Instruction:
    """An instruction, its optional input, and the output to be given."""

    id: str
    instruction: str
    input: str
    output: str

    def __post_init__(self) -> None:
        """Refuse what cannot be asked."""
        _check(self.id, "id", self.id)
        _check(self.id, "instruction", self.instruction)
        _check(self.id, "input", self.input, may_be_blank=True)
        _check(self.id, "output", self.output, may_be_blank=True)

    @property
    def asked(self) -> str:
        """Return the text that is asked."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction

    @property
    def fields(self) -> list[object]:
        """Return everything that decides the item, for hashes."""
        return [self.id, self.instruction, self.input, self.output]


Item = Question | Problem | Program | Instruction
ItemT = TypeVar("ItemT", bound=Item)


def normalised(item: Item) -> str:
    """Return what is asked without case and spacing: equal for the same item asked twice."""
    return " ".join(item.asked.casefold().split())


def data_hash(items: Iterable[Item]) -> str:
    """Return the sha256 over every field of every item, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item.fields).encode() + b"\n")
    return digest.hexdigest()


def content_id(*fields: str) -> str:
    """Return an id for an item whose source gives none: the same wherever the item lies."""
    return hashlib.sha256("\0".join(fields).encode(errors="surrogatepass")).hexdigest()[:16]


def overlap(items: Iterable[ItemT], others: Iterable[Item]) -> list[ItemT]:
    """List those of `items` whose normalised text also stands in `others`."""
    known = {normalised(other) for other in others}
    return [item for item in items if normalised(item) in known]


def chance_level(items: Sequence[Item]) -> float:
    """Return the accuracy that takes no reading: the mean of 1 / number of choices, 0 without.

    Where all questions have the same choices, as BoolQ's, it is the share of the commonest answer:
    what a model scores that has learnt to say nothing else.
    """
    questions = [item for item in items if isinstance(item, Question)]
    if len(questions) == len(items) > 1 and len({question.choices for question in questions}) == 1:
        ((_, commonest),) = Counter(question.answer for question in questions).most_common(1)
        return commonest / len(items)
    return sum(1 / len(question.choices) for question in questions) / len(items)
