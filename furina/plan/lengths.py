"""How many rows a run trains on, and how long they are: measured on a sample, else a bound."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean

from furina.data.batches import Example, StepBatches, collate, encode_examples
from furina.data.items import Item
from furina.data.protocols import get_protocol
from furina.data.sources import Source
from furina.data.tasks import Task, get_task
from furina.experiment.config import RunConfig
from furina.plan.at_hand import (
    counting,
    items_at_hand,
    number_of_items,
    spaced,
    tokenizer_of,
)

LONGEST = 16
"""Items with most text, which are tokenised to find the longest row."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a training row.

    Attributes:
        mean: without padding.
        padded: with padding, as it is computed.
        longest: of the longest row, padded.
        answer: those that are trained.
        tokenizer: whose count it is; None for an upper bound.
    """

    mean: float
    padded: float
    longest: int
    answer: float
    tokenizer: str | None = None


def epoch_rows(config: RunConfig) -> dict[str, int]:
    """Return how many rows of each task an epoch has."""
    shares, rows = config.trained, {}
    for number, (name, share) in enumerate(shares.items()):
        held_out, odd = divmod(config.validation_size, len(shares))
        size = number_of_items(name, "train", config.source, config.data_dir)
        left = max(0, size - held_out - (number < odd))
        rows[name] = round(min(left, share.cap or left) * share.weight)
    return rows


def steps_of(config: RunConfig) -> int:
    """Return the optimiser steps of a run."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return -(-config.epochs * sum(epoch_rows(config).values()) // config.batch_size)


def training_lengths(config: RunConfig, measure: bool = True) -> Lengths:
    """Return the lengths of a run's training rows; a bound unless `measure`.

    It is measured where the rows and a tokenizer can be read without a network.
    """
    name = counting(config.backbone) if measure else None
    if name is not None:
        where = config.protocol, config.source, config.data_dir, config.max_length
        found = {task: _sampled(name, task, *where) for task in config.trained}
        if all(sample for sample, _ in found.values()):
            rows = _mixed(config, {task: sample for task, (sample, _) in found.items()})
            longest = max(longest for _, longest in found.values())
            return _lengths(config, rows, longest, name)
    most = config.max_length
    return Lengths(most, most, most, _most_answers(config))


def label_bytes(task: Task) -> int:
    """Return the bytes of a task's longest label and its space: a token has one at least."""
    assert task.label
    return max(len(f" {label}".encode()) for label in task.label.labels)


def _lengths(config: RunConfig, examples: Sequence[Example], longest: int, name: str) -> Lengths:
    mean = fmean(len(each.input_ids) for each in examples)
    answer = fmean(each.answer_length for each in examples)
    enough = list(examples) * -(-config.batch_size // len(examples))
    batches = StepBatches(
        enough,
        config.batch_size,
        pad_id=0,
        seed=config.seed,
        micro_batch_size=config.micro_batch_size,
        bucket_steps=config.bucket_steps,
    )
    windows = [batches.window(step) for step in range(len(batches))]
    computed = sum(batch["input_ids"].numel() for window in windows for batch in window)
    return Lengths(mean, computed / (len(windows) * config.batch_size), longest, answer, name)


def _mixed(config: RunConfig, samples: dict[str, tuple[Example, ...]]) -> list[Example]:
    """Return rows of each task in the proportions of the mixture, in random order."""
    sizes = epoch_rows(config)
    most = max(sizes.values())
    mixed: list[Example] = []
    for task, rows in samples.items():
        mixed += rows[: max(1, round(len(rows) * sizes[task] / most))] if most else rows
    random.Random(0).shuffle(mixed)
    return mixed


def _most_answers(config: RunConfig) -> int:
    """Return how many tokens of a row can be trained on, whatever the tokenizer."""
    if config.protocol == "label":
        return max(label_bytes(get_task(name)) for name in config.trained)
    return config.max_length


@cache
def _sampled(
    tokenizer: str,
    task: str,
    protocol: str,
    source: Source,
    data_dir: str | None,
    max_length: int,
) -> tuple[tuple[Example, ...], int]:
    """Return a sample of a task's rows, none if they cannot be read, and the longest's tokens."""
    items = items_at_hand(task, "train", source, data_dir)
    if not items:
        return (), 0
    found, asks = get_task(task), get_protocol(protocol)
    by_text = sorted(items, key=lambda item: -sum(map(len, asks.pair(found, item))))

    def encoded(some: Sequence[Item]) -> tuple[Example, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that long ones are cut is said in training
            return tuple(encode_examples(tokenizer_of(tokenizer), found, some, asks, max_length))

    sample = encoded(spaced(items))
    padded = collate([*sample, *encoded(by_text[:LONGEST])], pad_id=0)
    return sample, padded["input_ids"].shape[1]
