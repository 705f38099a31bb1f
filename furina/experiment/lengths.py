"""How many rows a run trains on, and how long they are: measured on a sample, else a bound."""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import NamedTuple

from furina.data.batches import PAD_MULTIPLE, encode_examples
from furina.data.items import Item
from furina.data.protocols import get_protocol
from furina.data.sources import Source
from furina.data.tasks import Task, get_task
from furina.experiment.at_hand import counting, items_at_hand, spaced, tokenizer_of
from furina.experiment.config import RunConfig

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


class Row(NamedTuple):
    """Tokens of an example, and those of its answer."""

    length: int
    answer: int


def epoch_rows(config: RunConfig) -> dict[str, int]:
    """Return how many rows of each task an epoch has, by the public counts."""
    shares, rows = config.trained, {}
    for number, (name, share) in enumerate(shares.items()):
        held_out, odd = divmod(config.validation_size, len(shares))
        left = max(0, get_task(name).rows.get("train", 0) - held_out - (number < odd))
        rows[name] = round(min(left, share.cap or left) * share.weight)
    return rows


def steps_of(config: RunConfig) -> int:
    """Return the optimiser steps of a run, those of its epochs by the public counts."""
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
    return Lengths(most, most, _ceil(most), _most_answers(config))


def label_bytes(task: Task) -> int:
    """Return the bytes of a task's longest label and its space: a token has one at least."""
    assert task.label
    return max(len(f" {label}".encode()) for label in task.label.labels)


def _lengths(config: RunConfig, rows: Sequence[Row], longest: int, name: str) -> Lengths:
    lengths = [row.length for row in rows]
    answer = fmean(row.answer for row in rows)
    return Lengths(fmean(lengths), _padded(config, lengths), _ceil(longest), answer, name)


def _mixed(config: RunConfig, samples: dict[str, tuple[Row, ...]]) -> list[Row]:
    """Return rows of each task in the proportions of the mixture, in random order."""
    sizes = epoch_rows(config)
    most = max(sizes.values())
    mixed: list[Row] = []
    for task, rows in samples.items():
        mixed += rows[: max(1, round(len(rows) * sizes[task] / most))] if most else rows
    random.Random(0).shuffle(mixed)
    return mixed


def _padded(config: RunConfig, lengths: Sequence[int]) -> float:
    """Return the mean length with padding, with micro-batches made as `StepBatches` does."""
    step, total = config.batch_size, 0
    micro = config.micro_batch_size or step
    for first in range(0, len(lengths), config.bucket_steps * step):
        near = list(lengths[first : first + config.bucket_steps * step])
        if config.bucket_steps > 1:
            near.sort()
        for start in range(0, len(near), step):
            rows = sorted(near[start : start + step], reverse=True)
            parts = [rows[place : place + micro] for place in range(0, len(rows), micro)]
            total += sum(len(part) * _ceil(part[0]) for part in parts)
    return total / len(lengths)


def _ceil(length: int) -> int:
    return -(-length // PAD_MULTIPLE) * PAD_MULTIPLE


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
) -> tuple[tuple[Row, ...], int]:
    """Return a sample of a task's rows, empty if they cannot be read, and the longest's tokens."""
    items = items_at_hand(task, "train", source, data_dir)
    if not items:
        return (), 0
    found, asks = get_task(task), get_protocol(protocol)
    by_text = sorted(items, key=lambda item: -sum(map(len, asks.pair(found, item))))

    def rows(some: Sequence[Item]) -> tuple[Row, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that long ones are cut is said in training
            examples = encode_examples(tokenizer_of(tokenizer), found, some, asks, max_length)
        return tuple(Row(len(each.input_ids), each.answer_length) for each in examples)

    sample = rows(spaced(items))
    return sample, max(row.length for row in (*sample, *rows(by_text[:LONGEST])))
