"""Checkpoints that survive being killed: written whole or not at all, read as plain tensors."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from furina.errors import ConfigurationError, FurinaError
from furina.storage import write_bytes

_DAMAGED_FILE = (zipfile.BadZipFile, zlib.error, struct.error, EOFError)
_DAMAGED_PICKLE = (UnpicklingError, RuntimeError, KeyError, ValueError)


class CheckpointError(FurinaError):
    """A training checkpoint is missing, damaged or no plain-tensor file."""


class AtomicCheckpointIO(CheckpointIO):
    """Trainer plugin: temporary file, flush to disk, rename; loads with `weights_only=True`.

    What was damaged in the meantime, be it by one bit, is refused.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write `checkpoint` to `path` atomically; raises FurinaError on a full disk."""
        if storage_options is not None:
            raise ConfigurationError("storage_options have no effect on local checkpoints.")
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getbuffer())

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: object = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read `path` onto the CPU as tensors and plain values; nothing is ever unpickled freely.

        Raises CheckpointError if the file is missing or damaged, or holds anything else.
        """
        if weights_only is False or map_location is not None:
            raise ConfigurationError(
                "Checkpoints are read with weights_only=True onto the CPU: leave out "
                "weights_only and map_location."
            )
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"There is no checkpoint {path}: start without one.")
        try:
            _require_whole(path)
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (*_DAMAGED_FILE, *_DAMAGED_PICKLE) as error:
            raise CheckpointError(
                f"The checkpoint {path} is damaged or was not written by a trainer of plain "
                "tensors: delete it and start again."
            ) from error
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete `path` if it is there."""
        Path(path).unlink(missing_ok=True)


class ResumeCheckpoint(Checkpoint):
    """Keep one checkpoint from which a killed run goes on bit for bit.

    ```python
    resume = ResumeCheckpoint("run/last.ckpt", every_n_steps=20)
    trainer = Trainer(callbacks=[resume], max_steps=100)
    trainer.fit(module, data, ckpt_path=resume.latest())
    ```

    It writes every n optimiser steps and after the last one, through `AtomicCheckpointIO`, which it
    installs; Lightning runs it after all other callbacks, so it saves the state they leave. Where a
    validation falls on the same step it writes after it, so that the resumed run neither repeats
    nor skips one.
    """

    def __init__(self, path: str | Path, every_n_steps: int) -> None:
        """Write to `path` every `every_n_steps` (at least 1) optimiser steps."""
        if every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps={every_n_steps} must be at least 1.")
        self.path = Path(path)
        self.every_n_steps = every_n_steps

    def latest(self) -> Path | None:
        """Return the checkpoint to resume from, or None when there is none yet."""
        return self.path if self.path.exists() else None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the atomic reader and writer; remove what a killed write left behind."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == "fit" and trainer.is_global_zero:
            for leftover in self.path.parent.glob(f".{self.path.name}.*"):
                leftover.unlink()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: torch.Tensor | Mapping[str, Any] | None,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint if one is due and no validation comes first."""
        if not _validation_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoint that waited for this validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.estimated_stepping_batches:
            trainer.save_checkpoint(self.path, weights_only=False)


def _require_whole(path: Path) -> None:
    """Raise BadZipFile unless all of a checkpoint's parts have the checksums stored beside them.

    torch.load takes a tensor with a changed bit as it is.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Return whether the fit loop validates after the batch that just ended.

    Only the loop itself knows (interval, epoch end, early stop); a checkpoint written before that
    validation would make Lightning skip it on resume.
    """
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
