"""How many test items a run scores, and how much is read and written for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import fmean

from furina.data.items import Question
from furina.data.protocols import ChoiceProtocol, GenerationProtocol, get_protocol
from furina.data.sources import Source
from furina.data.tasks import get_task
from furina.experiment.config import RunConfig
from furina.plan.at_hand import (
    counting,
    items_at_hand,
    number_of_items,
    spaced,
    tokenizer_of,
)
from furina.plan.lengths import label_bytes

MOST_CHOICES = 5
"""Choices of a question whose task has no labels, where they cannot be counted."""


@dataclass(frozen=True)
class Asked:
    """Tokens of a scored item.

    Attributes:
        context: of its prompt.
        choices: continuations that are compared; 0 where an answer is written.
        continued: of all continuations together.
        written: longest answer that is written.
        beams: of the search that writes it.
        tokenizer: whose count it is; None for an upper bound.
    """

    context: float
    choices: float = 0.0
    continued: float = 0.0
    written: int = 0
    beams: int = 1
    tokenizer: str | None = None

    def read(self, engine: str) -> float:
        """Return the tokens that an engine reads: the prompt once, or once for every choice."""
        prompts = 1.0 if engine == "shared" or not self.choices else self.choices
        return prompts * self.context + self.continued

    @property
    def row(self) -> float:
        """The tokens of a row that holds one choice."""
        return self.context + self.continued / max(self.choices, 1.0)


def number_asked(config: RunConfig, task: str) -> int:
    """Return how many of a task's test items are scored."""
    rows = number_of_items(task, "test", config.source, config.data_dir)
    return min(rows, config.test_size or rows)


def asked(config: RunConfig, task: str, protocol: str, measure: bool = True) -> Asked:
    """Return how a protocol asks a task's items; a bound unless `measure`.

    It is measured where the items and a tokenizer can be read without a network.
    """
    asks, found = get_protocol(protocol), get_task(task)
    if not isinstance(asks, ChoiceProtocol | GenerationProtocol) and found.text:
        protocol = "text"  # lm-eval's own prompts are of this shape
    name = counting(config.backbone) if measure else None
    if name is not None:
        measured = _measured(name, task, protocol, config.source, config.data_dir)
        if measured is not None:
            return measured
    return _bound(task, protocol, config.max_length)


@cache
def _measured(
    tokenizer: str, task: str, protocol: str, source: Source, data_dir: str | None
) -> Asked | None:
    items = items_at_hand(task, "test", source, data_dir)
    if not items:
        return None
    found, asks, encoder = get_task(task), get_protocol(protocol), tokenizer_of(tokenizer)

    def count(text: str) -> int:
        return len(encoder.encode(text, add_special_tokens=False))

    contexts = [count(asks.context(found, item)) for item in spaced(items)]
    if isinstance(asks, GenerationProtocol):
        how = asks.decoding(found)
        written, beams = how.max_new_tokens, how.num_beams
        return Asked(fmean(contexts), written=written, beams=beams, tokenizer=tokenizer)
    assert isinstance(asks, ChoiceProtocol)
    answers = [asks.answers(found, item) for item in spaced(items) if isinstance(item, Question)]
    choices = fmean(len(each) for each in answers)
    continued = fmean(sum(map(count, each)) for each in answers)
    return Asked(fmean(contexts), choices, continued, tokenizer=tokenizer)


def _bound(task: str, protocol: str, most: int) -> Asked:
    """Return rows of `most` tokens, which a question takes once for each choice by text."""
    found, asks = get_task(task), get_protocol(protocol)
    if isinstance(asks, GenerationProtocol):
        how = asks.decoding(found)
        return Asked(most, written=how.max_new_tokens, beams=how.num_beams)
    choices = len(found.label.labels) if found.label else MOST_CHOICES
    if protocol == "label":
        return Asked(most, choices, choices * label_bytes(found))
    return Asked(most, choices, (choices - 1) * most)
