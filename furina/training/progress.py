"""Report to `furina.progress` how many steps are done."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from furina.progress import advance, say


class StepProgress(pl.Callback):
    """Tell `furina.progress` of every optimiser step, and of every batch of a validation."""

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Tell that a run goes on, and from where."""
        if trainer.state.fn == "fit":
            say(f"resumed at step {checkpoint['global_step']} of {trainer.max_steps}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell of the steps that a resumed run has done before."""
        advance(trainer.global_step, trainer.max_steps, "steps")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *batch: Any
    ) -> None:
        """Tell of a step."""
        advance(trainer.global_step, trainer.max_steps, "steps")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Tell that a validation begins."""
        self._validated(trainer, 0)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tell of a validated batch."""
        self._validated(trainer, batch_idx + 1)

    @staticmethod
    def _validated(trainer: pl.Trainer, done: int) -> None:
        advance(done, int(sum(trainer.num_val_batches)), "validation batches")
