"""Refuse, before the first step, what would silently train something else."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import callbacks
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from furina.errors import ConfigurationError
from furina.model.state import state_of
from furina.training.sharding import ShardedStrategy

_REFUSED: dict[type[pl.Callback], str] = {
    callbacks.StochasticWeightAveraging: "replaces the learning rate's schedule",
    callbacks.WeightAveraging: "averages the frozen backbone too, which rounding then moves",
    callbacks.ModelPruning: "prunes the frozen backbone, which no checkpoint holds",
    callbacks.BaseFinetuning: "adds parameters during training, which its schedule does not know: "
    "unfreeze them before fit",
    callbacks.GradientAccumulationScheduler: "does not apply, as one batch is one optimiser step: "
    "cut it with the data's micro_batch_size",
    callbacks.BatchSizeFinder: "searches when the schedule is made already: call "
    "Tuner(trainer).scale_batch_size before fit",
    callbacks.LearningRateFinder: "gives all parameters one learning rate, where a method has "
    "several: compare short runs with FinetuneModule(learning_rate=…)",
}
"""Callbacks of Lightning under which this module would train something else than it says."""


def refuse_callbacks(trainer: pl.Trainer) -> None:
    """Raise ConfigurationError for a callback that cannot work here, with the reason."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _REFUSED.items():
            if isinstance(callback, kind) and not _is_before_fit(callback):
                advice = "" if ":" in reason else ": leave it out"
                name = type(callback).__name__
                raise ConfigurationError(f"Lightning's callback {name} {reason}{advice}.")


def _is_before_fit(callback: pl.Callback) -> bool:
    """Tell whether this is how a Tuner searches a batch size."""
    return isinstance(callback, callbacks.BatchSizeFinder) and callback._early_exit


def refuse_other_uses(trainer: pl.Trainer, compiled: bool) -> None:
    """Raise ConfigurationError for what a Trainer does and this module does not."""
    if trainer.state.fn in ("test", "predict"):
        raise ConfigurationError(
            f"Trainer.{trainer.state.fn.value} has nothing to do here: use Trainer.validate for a "
            "loss, model.generate for text, or furina.evaluation for the score of a task."
        )
    if compiled:
        raise ConfigurationError(
            "torch.compile(FinetuneModule(…)) would compile the optimiser step's bookkeeping: pass "
            "FinetuneModule(compile_backend='inductor') instead."
        )


def refuse_ignored_options(trainer: pl.Trainer) -> None:
    """Raise ConfigurationError for Trainer options that manual optimisation does not honour."""
    if trainer.accumulate_grad_batches != 1:
        raise ConfigurationError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) does not apply: "
            "one batch is one optimiser step; cut it with the data's micro_batch_size."
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise ConfigurationError(
            "Trainer(overfit_batches=…) would not repeat its batches, as a step's number decides "
            "what it trains on: train on a data set of that size instead."
        )
    if trainer.limit_train_batches not in (1.0, None) and trainer.max_steps == -1:
        raise ConfigurationError(
            "Trainer(limit_train_batches=…) need not divide the data's epoch, which goes on where "
            "it was cut, so that fewer steps are done than the schedule counts: set max_steps."
        )
    if trainer.gradient_clip_val:
        raise ConfigurationError(
            f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) does not apply: set "
            "FinetuneModule(gradient_clip=…) instead."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigurationError(
            "Trainer(precision='16-mixed') scales the gradients that are clipped here: use "
            "'bf16-mixed' or '32-true'."
        )


def refuse_unsharded_options(trainer: pl.Trainer, compiled: bool) -> None:
    """Raise ConfigurationError for what a model that is sharded over devices does not allow."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if not isinstance(strategy, ShardedStrategy):
        raise ConfigurationError(
            "Trainer(strategy=ModelParallelStrategy(…)) keeps checkpoints in parts: use "
            "furina.training.ShardedStrategy(world_size)."
        )
    if compiled:
        raise ConfigurationError(
            "torch.compile does not work on a sharded model, whose layers are gathered by hooks "
            "that break the graph: leave out compile, or use strategy ddp."
        )
    if trainer.validate_loop.inference_mode:
        raise ConfigurationError(
            "A sharded model's weights cannot be trained once gathered in inference mode: set "
            "Trainer(inference_mode=False)."
        )


def require_trainable(model: nn.Module) -> None:
    """Raise ConfigurationError if the adapter is merged or the backbone is of inference mode."""
    if any(layer.merged for layer in state_of(model).layers.values()):
        raise ConfigurationError("The adapter is merged: call furina.unmerge before training.")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigurationError(
            "A model that was loaded in torch.inference_mode cannot be trained: load it outside."
        )
