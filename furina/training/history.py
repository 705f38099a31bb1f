"""What a run looked like, step by step, kept across kills and resumes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from furina.records.environment import peak_memory_bytes

LOSSES = ("training", "auxiliary", "validation")


class LossHistory(pl.Callback):
    """Record every step's loss, every validation loss, the time spent in training and its memory.

    It is part of the checkpoint, so a resumed run has the whole history and no step twice, where a
    logger's file starts again. Losses stay on the device until they are asked for.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._losses: dict[str, list[tuple[int, Tensor | float]]] = {name: [] for name in LOSSES}
        self._seconds = 0.0
        self._started: float | None = None
        self._peak = 0

    @property
    def training(self) -> list[tuple[int, float]]:
        """(optimiser step, loss) of every step, counted from 1."""
        return self._plain("training")

    @property
    def auxiliary(self) -> list[tuple[int, float]]:
        """(optimiser step, the auxiliary part of its loss) of every step, counted from 1."""
        return self._plain("auxiliary")

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(optimiser steps done, validation loss) of every validation."""
        return self._plain("validation")

    @property
    def seconds(self) -> float:
        """Seconds in training over all resumed parts, without validations and checkpoints."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._seconds + running

    @property
    def peak_memory_bytes(self) -> int:
        """Peak memory of this process, and of those whose checkpoint it went on from."""
        return max(self._peak, peak_memory_bytes())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Go on counting after a validation or a checkpoint."""
        if self._started is None:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Keep the step's loss."""
        assert isinstance(outputs, Mapping)
        self._losses["training"].append((trainer.global_step, outputs["loss"]))
        self._losses["auxiliary"].append((trainer.global_step, outputs["auxiliary"]))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause(pl_module.device)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the validation loss."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            loss = trainer.callback_metrics["validation/loss"]
            self._losses["validation"].append((trainer.global_step, loss))

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the clock: a disk's time is not the method's."""
        self._pause(pl_module.device)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._pause(pl_module.device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything recorded so far, as plain numbers."""
        return {
            **{name: self._plain(name) for name in LOSSES},
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._losses = {name: list(state_dict.get(name, ())) for name in LOSSES}
        self._seconds = state_dict["seconds"]
        self._peak = state_dict.get("peak_memory_bytes", 0)

    def _pause(self, device: torch.device) -> None:
        if device.type == "cuda":  # its steps may still be running
            torch.cuda.synchronize(device)
        self._seconds, self._started = self.seconds, None

    def _plain(self, name: str) -> list[tuple[int, float]]:
        """Return the losses of that name as numbers, and keep them so."""
        plain = [(step, float(loss)) for step, loss in self._losses[name]]
        self._losses[name] = list(plain)
        return plain
