"""Tiny models, data and trainers shared by the training tests and their child processes."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import furina
from furina.backbones.load import load_backbone
from furina.data.batches import Example, StepBatches
from furina.training import FinetuneModule

# A server that has imported everything slow forks each child: real processes, started at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "furina.backbones.load",
        "furina.data.batches",
        "furina.training",
        "transformers.models.llama.modeling_llama",
    ]
)

VOCABULARY = 384
Batch = dict[str, Tensor]


def examples(count: int = 44, seed: int = 0) -> list[Example]:
    """Random prompts of 8 to 23 tokens with answers of 1 to 4."""
    draw = random.Random(seed)
    return [
        Example(
            tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(8, 24))),
            draw.randrange(1, 5),
        )
        for _ in range(count)
    ]


def windows(
    steps: int, batch_size: int = 8, micro_batch_size: int | None = None
) -> list[list[Batch]]:
    batches = StepBatches(examples(), batch_size, 0, seed=0, micro_batch_size=micro_batch_size)
    return [batches.window(step) for step in range(steps)]


OPTIONS: dict[str, dict[str, Any]] = {
    "furina": {"rank": 4, "num_experts": 4},
    "lora": {"rank": 8},
    "flylora": {"rank": 8, "active_rank": 3},
    "mixlora": {"rank": 2, "num_experts": 4},
}


def tiny(method: str = "furina", dtype: str = "float32", dropout: float = 0.0) -> Any:
    """Return the tiny Llama in training mode with an adapter whose every tensor has moved."""
    model = load_backbone("tiny-llama", dtype)
    furina.adapt(model, method, seed=1, dropout=dropout, **OPTIONS[method])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in furina.adapter_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.05 * noise)
    return model.train()


def in_order(batches: list[Batch]) -> DataLoader[Batch]:
    return DataLoader(cast("Dataset[Batch]", batches), batch_size=None)


class RandomQuestions(pl.LightningDataModule):
    """A data module like the benchmarks': exact windows for training, micro-batches to validate."""

    def __init__(self, batch_size: int = 8, micro_batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size

    def train_dataloader(self) -> StepBatches:
        trainer = self.trainer
        assert trainer is not None
        return StepBatches(
            examples(),
            self.batch_size,
            0,
            seed=0,
            micro_batch_size=self.micro_batch_size,
            start_step=lambda: trainer.global_step,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> Any:
        return in_order([window[0] for window in windows(3, batch_size=4)])


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": any(
            isinstance(callback, pl.callbacks.Checkpoint)
            for callback in options.get("callbacks", [])
        ),
        "default_root_dir": folder,
    }
    return pl.Trainer(**{**settings, **options})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in furina.adapter_parameters(model).items()
        if parameter.grad is not None
    }


def fit(module: FinetuneModule, folder: Path, data: Any = None, **options: Any) -> pl.Trainer:
    resume_from = options.pop("ckpt_path", None)
    run = trainer(folder, **options)
    run.fit(module, data or RandomQuestions(), ckpt_path=resume_from)
    return run
