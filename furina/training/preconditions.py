"""What would train wrongly without a word, refused before the first step."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from furina.errors import ConfigurationError
from furina.inject import adapter_parameters, state_of


def refuse_ignored_options(trainer: pl.Trainer) -> None:
    """Raise ConfigurationError for Trainer options that manual optimisation does not honour."""
    if trainer.accumulate_grad_batches != 1:
        raise ConfigurationError(
            f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) does not apply: "
            "one batch is one optimiser step; cut it with the data's micro_batch_size."
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


def require_trainable(model: nn.Module) -> None:
    """Raise ConfigurationError if the adapter is merged or its parameters are below fp32."""
    if any(layer.merged for layer in state_of(model).layers.values()):
        raise ConfigurationError("The adapter is merged: call furina.unmerge before training.")
    for name, parameter in adapter_parameters(model).items():
        if parameter.element_size() < 4:
            raise ConfigurationError(
                f"{name} is {parameter.dtype} but adapters train in fp32: load the backbone in the "
                "low dtype and leave Trainer(precision) at '32-true' or 'bf16-mixed'."
            )
