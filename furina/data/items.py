"""The items of the benchmarks, and facts about lists of them that need no model."""

from __future__ import annotations

import hashlib
import json
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from furina.errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Item(ABC):
    """Base of every kind of item: an id, and texts, which only `may_be_blank` lets be blank.

    Raises:
        DataError: a field is no text, blank, or undecodable.
    """

    id: str

    may_be_blank: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be asked or judged."""
        for name, text in vars(self).items():
            self._check(name, text)

    def _check(self, field: str, text: object) -> None:
        """Refuse what no model can read: no text, a blank one, or an unpaired surrogate."""
        if not isinstance(text, str):
            raise DataError(f"Item {self.id!r} has a {field} that is {text!r} and no text.")
        if not (field in self.may_be_blank or text.strip()):
            raise DataError(
                f"Item {self.id!r} has a blank {field}: there is nothing to read or to score."
            )
        if not text.isascii() and _SURROGATE.search(text):
            raise DataError(f"Item {self.id!r} has a {field} with half of a surrogate pair in it.")

    @property
    @abstractmethod
    def asked(self) -> str:
        """Return the text that is asked."""

    @property
    def fields(self) -> list[object]:
        """Return everything that decides the item, for hashes."""
        return list(vars(self).values())


@dataclass(frozen=True)
class Question(Item):
    """A multiple-choice question: a stem, its choices in order, and the index of the right one.

    `context` is what the stem is asked about (BoolQ's passage), empty where there is none.

    Raises:
        DataError: fewer than two choices, a blank or undecodable text, or `answer` is not the index
            of a choice.
    """

    stem: str
    choices: tuple[str, ...]
    answer: int
    context: str = ""

    may_be_blank: ClassVar[tuple[str, ...]] = ("context",)

    def __post_init__(self) -> None:
        """Refuse a question that cannot be asked or scored."""
        for name in ("id", "stem", "context"):
            self._check(name, getattr(self, name))
        for choice in self.choices:
            self._check("choice", choice)
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
        """Return everything that decides the item; a context only where there is one."""
        return super().fields if self.context else super().fields[:-1]


@dataclass(frozen=True)
class Problem(Item):
    """A mathematical problem, worked out in `solution` (empty where the source has none).

    `answer` is the final answer as text: a number, a letter (AQuA) or LaTeX (MATH).
    """

    question: str
    solution: str
    answer: str

    may_be_blank: ClassVar[tuple[str, ...]] = ("solution",)

    @property
    def asked(self) -> str:
        """Return the text that is asked."""
        return self.question


@dataclass(frozen=True)
class Program(Item):
    """A function to be written: its head and docstring, and the tests of its body.

    `tests` defines `check(candidate)`, `solution` is a body that passes.
    """

    prompt: str
    entry_point: str
    tests: str
    solution: str

    may_be_blank: ClassVar[tuple[str, ...]] = ("tests", "solution")

    @property
    def asked(self) -> str:
        """Return the text that is asked."""
        return self.prompt


@dataclass(frozen=True)
class Instruction(Item):
    """An instruction, its optional input, and the output to be given."""

    instruction: str
    input: str
    output: str

    may_be_blank: ClassVar[tuple[str, ...]] = ("input", "output")

    @property
    def asked(self) -> str:
        """Return the text that is asked."""
        return f"{self.instruction}\n{self.input}" if self.input else self.instruction


ItemT = TypeVar("ItemT", bound=Item)


def normalised(item: Item) -> str:
    """Return what is asked, without case and spacing, so that repeats are equal."""
    return " ".join(item.asked.casefold().split())


def data_hash(items: Iterable[Item]) -> str:
    """Return the sha256 over every field of every item, in order."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item.fields).encode() + b"\n")
    return digest.hexdigest()


def content_id(*fields: str) -> str:
    """Return an id for an item whose source gives none, from its texts alone."""
    return hashlib.sha256("\0".join(fields).encode(errors="surrogatepass")).hexdigest()[:16]


def overlap(items: Iterable[ItemT], others: Iterable[Item]) -> list[ItemT]:
    """List those of `items` whose normalised text also stands in `others`."""
    known = {normalised(other) for other in others}
    return [item for item in items if normalised(item) in known]


def chance_level(items: Sequence[Item]) -> float:
    """Return the accuracy of guessing: the mean of 1 / number of choices, 0 without choices.

    Where all questions have the same choices, as in BoolQ, it is the share of the commonest answer:
    the score of a model that has learnt to say nothing else.
    """
    questions = [item for item in items if isinstance(item, Question)]
    if len(questions) == len(items) > 1 and len({question.choices for question in questions}) == 1:
        ((_, commonest),) = Counter(question.answer for question in questions).most_common(1)
        return commonest / len(items)
    return sum(1 / len(question.choices) for question in questions) / len(items)
