"""Batches as a pure function of seed and optimiser step, so a resumed run needs no iterator.

One item is a *window*: the micro-batches of one optimiser step. A micro-batch is a dict of
`input_ids`, `attention_mask` and `labels`, each (rows, tokens), right-padded. Labels are aligned
with `input_ids` (the model shifts them) and -100 wherever no answer token stands. A mixture's
micro-batch also holds `task_types` (rows,).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from furina.data.encoding import Encoder
from furina.data.items import Item
from furina.data.protocols import Protocol
from furina.data.splits import seeded_key
from furina.data.tasks import Task
from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = dict[str, Tensor]

IGNORED = -100
PAD_MULTIPLE = 8


@dataclass(frozen=True)
class Example:
    """A tokenised item; the last `answer_length` of `input_ids` are what is trained."""

    input_ids: tuple[int, ...]
    answer_length: int
    task_type: int | None = None


def encode_examples(
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    items: Sequence[Item],
    protocol: Protocol,
    max_length: int,
    task_type: int | None = None,
) -> list[Example]:
    """Tokenise each item with its right answer as the protocol trains it, once.

    An example longer than `max_length` loses the start of its context, never a BOS or a part of its
    answer; one whose answer alone is as long is left out. How many were is warned about.

    Raises:
        ConfigurationError: `max_length` leaves no room for any answer, the protocol ends its
            examples and the tokenizer has no end-of-text token, or that adds one by itself.
    """
    if protocol.ends and tokenizer.eos_token_id is None:
        raise ConfigurationError(
            f"Protocol {protocol.name} ends its answers and the tokenizer has no end-of-text "
            "token: set tokenizer.eos_token."
        )
    end = [int(tokenizer.eos_token_id)] if protocol.ends else []
    encoder, examples, truncated = Encoder(tokenizer), [], 0
    for item in items:
        context, answer, _ = encoder.trained(*protocol.pair(task, item))
        answer = [*answer, *end]
        if not answer:
            raise ConfigurationError(
                f"The tokenizer gives the answer of item {item.id!r} of {task.name} no token, so "
                "there is nothing to train: use the model's own tokenizer."
            )
        if len(answer) >= max_length:
            continue
        ids = tuple(encoder.cut(context + answer, max_length, keep=len(answer)))
        truncated += len(context) + len(answer) > max_length
        trained = len(ids) if protocol.loss_on_prompt else len(answer)
        examples.append(Example(ids, trained, task_type))
    if items and not examples:
        raise ConfigurationError(
            f"max_length={max_length} is too short: every answer of {task.name} alone is as long; "
            "raise it."
        )
    room, left_out = f"max_length={max_length} tokens", len(items) - len(examples)
    for count, fate in (
        (truncated, f"are longer than {room} and lost the start of their context"),
        (left_out, f"have an answer that alone fills {room} and were left out"),
    ):
        if count:
            said = f"{count} of {len(items)} examples of {task.name} {fate}."
            warnings.warn(said, stacklevel=2)
    return examples


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad examples on the right, to the longest rounded up to a multiple of 8."""
    longest = max(len(example.input_ids) for example in examples)
    shape = len(examples), math.ceil(longest / PAD_MULTIPLE) * PAD_MULTIPLE
    input_ids = torch.full(shape, pad_id, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids, device="cpu")
        attention_mask[row, :length] = 1
        answer = slice(length - example.answer_length, length)
        labels[row, answer] = input_ids[row, answer]
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    types = [example.task_type for example in examples if example.task_type is not None]
    if len(types) == len(examples):
        batch["task_types"] = torch.tensor(types, device="cpu")
    return batch


def _micro_batches(examples: Sequence[Example], size: int, pad_id: int) -> Iterator[Batch]:
    return (collate(examples[at : at + size], pad_id) for at in range(0, len(examples), size))


class InOrder(IterableDataset[Batch]):
    """Examples in micro-batches of `size` rows; iterable, so that Lightning leaves them alone."""

    def __init__(self, examples: Sequence[Example], size: int, pad_id: int) -> None:
        """Collate nothing before it is asked for."""
        self.examples, self.size, self.pad_id = examples, size, pad_id

    def __len__(self) -> int:
        """Return the number of micro-batches."""
        return math.ceil(len(self.examples) / self.size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the micro-batches in order."""
        return _micro_batches(self.examples, self.size, self.pad_id)


class StepBatches(IterableDataset[list[Batch]]):
    """Iterate over the windows of the current epoch, from the current optimiser step on.

    The rows of step s are entries of a permutation that is seeded by (seed, epoch), where
    epoch, i = divmod(s, steps per epoch); the last `len(examples) % batch_size` rows of each
    permutation are left out. With `bucket_steps` > 1, the rows of that many steps are sorted by
    length before they are cut into steps, which then change places at random: a step pads little,
    but its rows are of like length. A step's rows are sorted by length, dealt out to the ranks
    (`rows[rank::world_size]`) and cut into micro-batches.

    Nothing of the iteration has to be stored: give `start_step` a callable that tells the number
    of optimiser steps done, and an iteration after a restart continues there. In a plain loop
    use `window(step)`.

    Args:
        examples: the tokenised train questions.
        batch_size: rows of one optimiser step over all ranks.
        pad_id: token id of padding.
        seed: seed of the permutations.
        micro_batch_size: rows of one forward on one rank; None for all of the rank's rows.
        bucket_steps: steps whose rows are sorted by length together; 1 for none.
        start_step: asked for the number of optimiser steps done whenever an iteration begins.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        ConfigurationError: a size is not positive, fewer examples than `batch_size`, or a
            `batch_size` that the processes cannot share evenly.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        pad_id: int,
        seed: int,
        micro_batch_size: int | None = None,
        bucket_steps: int = 1,
        start_step: Callable[[], int] = lambda: 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check the sizes; nothing is collated before it is asked for."""
        sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
        for name, size in {**sizes, "bucket_steps": bucket_steps}.items():
            if size is not None and (type(size) is not int or size < 1):
                raise ConfigurationError(f"{name}={size} must be at least 1, and a whole number.")
        if len(examples) < batch_size:
            raise ConfigurationError(
                f"batch_size={batch_size} is more than the {len(examples)} train questions."
            )
        if batch_size % world_size:
            raise ConfigurationError(
                f"batch_size={batch_size} cannot be shared evenly by {world_size} processes: "
                "choose a multiple."
            )
        self.examples, self.batch_size, self.pad_id, self.seed = examples, batch_size, pad_id, seed
        self.micro_batch_size = micro_batch_size or batch_size
        self.bucket_steps = bucket_steps
        self.start_step, self.rank, self.world_size = start_step, rank, world_size
        self._permutation: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of optimiser steps in an epoch."""
        return len(self.examples) // self.batch_size

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the windows from `start_step()` to the end of that step's epoch."""
        start = self.start_step()
        for step in range(start, (start // len(self) + 1) * len(self)):
            yield self.window(step)

    def window(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of optimiser step `step`, counted from 0."""
        epoch, index = divmod(step, len(self))
        order = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        # Longest first: a batch that does not fit into memory fails before the work is done.
        rows = sorted((self.examples[row] for row in order), key=lambda row: -len(row.input_ids))
        mine = rows[self.rank :: self.world_size]
        return list(_micro_batches(mine, self.micro_batch_size, self.pad_id))

    def _order(self, epoch: int) -> list[int]:
        if self._permutation[0] != epoch:
            digest = seeded_key(self.seed, str(epoch))
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            order = _permutation(len(self.examples), generator)
            self._permutation = (epoch, self._bucketed(order, generator))
        return self._permutation[1]

    def _bucketed(self, order: list[int], generator: torch.Generator) -> list[int]:
        """Sort the rows of every `bucket_steps` steps by length, and mix those steps."""
        if self.bucket_steps == 1:
            return order
        size, bucket = self.batch_size, self.bucket_steps * self.batch_size
        rows = order[: len(self) * size]
        result: list[int] = []
        for first in range(0, len(rows), bucket):
            near = sorted(
                rows[first : first + bucket], key=lambda row: len(self.examples[row].input_ids)
            )
            for step in _permutation(len(near) // size, generator):
                result += near[step * size : (step + 1) * size]
        return result

    def state_dict(self) -> dict[str, int]:
        """Return nothing: the position is the optimiser step, which the trainer keeps."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Accept the empty state; having both methods tells Lightning that resuming is exact."""


def _permutation(n: int, generator: torch.Generator) -> list[int]:
    order: list[int] = torch.randperm(n, generator=generator, device="cpu").tolist()
    return order
