"""Measure what the record says of a finished training, in one process on one device."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from furina.data.batches import Batch, StepBatches
from furina.data.module import TaskDataModule
from furina.experiment.config import RunConfig
from furina.experiment.process import optimiser_steps
from furina.model.inference import evaluation_mode
from furina.model.parameters import describe
from furina.model.selection import record_selection
from furina.model.state import state_of
from furina.progress import advance, part
from furina.records import Training
from furina.training import LossHistory, gradient_ratio
from furina.training.schedule import step_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATIO_WINDOWS = 3
"""Optimiser steps after the last one on whose batches the gradient ratio is measured."""


@part("measuring selection and gradients")
def measured(
    config: RunConfig,
    model: PreTrainedModel,
    data: TaskDataModule,
    history: LossHistory,
    peak_memory_bytes: int,
) -> Training:
    """Return the training's record; `peak_memory_bytes` is the largest peak of its devices."""
    counts, steps = describe(model), optimiser_steps(config, data)
    has_auxiliary = state_of(model).config.has_auxiliary_loss
    return Training(
        steps=steps,
        seconds=history.seconds,
        peak_memory_bytes=peak_memory_bytes,
        trainable=counts.trainable,
        trainable_without_router=counts.trainable_without_router,
        total=counts.total,
        final_loss=history.training[-1][1],
        loss_curve=tuple(history.training),
        validation_curve=tuple(history.validation),
        auxiliary_curve=tuple(history.auxiliary) if has_auxiliary else (),
        gradient_ratio=_gradient_ratio(model, one_device(config, data), steps, config.seed),
        selection=_selection(model, data),
    )


def one_device(config: RunConfig, data: TaskDataModule) -> StepBatches:
    """Return the train batches in micro-batches of as many rows as a device was trained with."""
    batches = data.train_dataloader()
    share = config.batch_size // config.world_size
    batches.micro_batch_size = min(batches.micro_batch_size, share)
    return batches


def _gradient_ratio(
    model: PreTrainedModel, batches: StepBatches, done: int, seed: int
) -> float | None:
    """Return the median ‖∇aux‖/‖∇task‖ over the steps that would have come next.

    Each has the dropout that it would have had, whether or not the run was killed before.
    """
    if not state_of(model).config.has_auxiliary_loss:
        return None
    ratios = []
    with torch.random.fork_rng():
        for step in range(done, done + RATIO_WINDOWS):
            torch.manual_seed(step_seed(seed, step, rank=0))
            window = [_on(model, batch) for batch in batches.window(step)]
            ratios.append(gradient_ratio(model, window)["ratio"])
            advance(len(ratios), RATIO_WINDOWS, "steps' gradients")
    known = [ratio for ratio in ratios if ratio is not None]
    return median(known) if known else None


@torch.inference_mode()
def _selection(model: PreTrainedModel, data: TaskDataModule) -> dict[str, float] | None:
    """Return the held-out top-K share as a mean over the adapted linears."""
    loaders: list[Any] = data.val_dataloader()
    if not state_of(model).config.records_selection or not loaders:
        return None
    with evaluation_mode(model), record_selection(model) as record:
        for number, batch in enumerate(loaders[0]):
            advance(number, len(loaders[0]), "held-out batches")
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            model(**_on(model, inputs), use_cache=False, logits_to_keep=1)
    return {"top_k_share": record.mean_top_k_share()}


def _on(model: PreTrainedModel, batch: Batch) -> Batch:
    return {key: tensor.to(model.device) for key, tensor in batch.items()}
