"""How tasks are asked: each `Protocol` that a module of this folder holds is one.

A protocol says what a model reads, what it may answer, and when that is right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

from furina.data.items import Item, Question
from furina.data.plugins import defined_in
from furina.data.tasks import Task
from furina.errors import ConfigurationError, nearest


class Pair(NamedTuple):
    """A training example as text: what is read, and what is to be continued."""

    context: str
    target: str


class Judgement(NamedTuple):
    """What was read out of an output by one rule, None for nothing, and whether it is right."""

    answer: str | None
    correct: bool

    @classmethod
    def of(
        cls, answer: str | None, gold: str, equal: Callable[[str, str], bool] = str.__eq__
    ) -> Judgement:
        """Judge an answer by what makes it equal to the right one; no answer is wrong."""
        return cls(answer, answer is not None and equal(answer, gold))


@dataclass(frozen=True)
class Decoding:
    """How an answer is generated; never by sampling.

    Attributes:
        max_new_tokens: longest answer in tokens.
        stop: texts at the first of which an answer is cut; they are not part of it.
        num_beams: beams of the search, 1 for greedy decoding.
        pass_mask: whether padding is masked; without, a prompt's answer depends on its batch.
        pad_id: token id of padding, the tokenizer's own if none.
    """

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    num_beams: int = 1
    pass_mask: bool = True
    pad_id: int | None = None


class Protocol(ABC):
    """How an item is asked in training and in evaluation, under a name and a version.

    `version` rises whenever a byte of a prompt or a rule of scoring changes: scores of two
    versions are not comparable. `loss_on_prompt` trains on the prompt as well; `ends` appends the
    tokenizer's end-of-text token to what is trained.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    trains: ClassVar[bool] = True
    loss_on_prompt: ClassVar[bool] = False
    ends: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, task: Task) -> str | None:
        """Return why this protocol cannot ask the task, None if it can."""

    @abstractmethod
    def context(self, task: Task, item: Item) -> str:
        """Return what a model reads in evaluation, byte for byte."""

    @abstractmethod
    def target(self, task: Task, item: Item) -> str:
        """Return what a model is trained to continue with, its leading space included."""

    def pair(self, task: Task, item: Item) -> Pair:
        """Return the training example; most protocols train on what they evaluate."""
        return Pair(self.context(task, item), self.target(task, item))

    def require(self, task: Task) -> None:
        """Raise ConfigurationError if this protocol cannot ask the task."""
        if reason := self.refusal(task):
            raise ConfigurationError(f"Protocol {self.name} cannot ask {task.name}: {reason}.")


class ChoiceProtocol(Protocol):
    """Scores a question by the log-likelihood of each of its possible answers."""

    @abstractmethod
    def answers(self, task: Task, question: Question) -> tuple[str, ...]:
        """Return the continuations that are compared; each starts with its space."""

    @abstractmethod
    def right(self, task: Task, question: Question) -> int:
        """Return the index of the right one among `answers`."""


class GenerationProtocol(Protocol):
    """Scores an item by what the model writes; `runs_code` if judging executes it."""

    runs_code: ClassVar[bool] = False

    def require_consent(self, task: Task, execute_code: bool) -> None:
        """Raise ConfigurationError if judging runs programs and nobody has said that it may."""
        if self.runs_code and not execute_code:
            raise ConfigurationError(
                f"Scoring {task.name} runs programs that the model writes: say --execute-code, on "
                "a machine where that may do no harm."
            )

    @abstractmethod
    def decoding(self, task: Task) -> Decoding:
        """Return how an answer is generated."""

    @abstractmethod
    def judge(self, task: Task, item: Item, output: str) -> dict[str, Judgement]:
        """Return, for each of `metrics`, what the output answers and whether that is right."""


@cache
def protocols() -> dict[str, Protocol]:
    """Return every protocol by name."""
    return {protocol.name: protocol for protocol in defined_in(__name__, Protocol)}


def get_protocol(name: str) -> Protocol:
    """Return the protocol called `name`; raises ConfigurationError with the nearest known name."""
    if name not in protocols():
        raise ConfigurationError(f"There is no protocol {name!r}.{nearest(name, protocols())}")
    return protocols()[name]
