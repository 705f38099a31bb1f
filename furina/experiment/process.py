"""What one process does for a run, alone or as one of several: load, adapt, train."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from furina.backbones.load import load_backbone, load_tokenizer
from furina.data.module import TaskDataModule
from furina.experiment.config import RunConfig
from furina.kernels.processor import best_device
from furina.model.inject import adapt
from furina.progress import part
from furina.training import (
    FinetuneModule,
    LossHistory,
    ResumeCheckpoint,
    ShardedStrategy,
    StepProgress,
    training_attention,
)

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def run_data(config: RunConfig) -> TaskDataModule:
    """Return the data module of a run's training and held-out rows; it has read nothing yet."""
    return TaskDataModule(
        load_tokenizer(config.backbone),
        config.mixture or config.task,
        config.protocol,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        bucket_steps=config.bucket_steps,
        validation_size=config.validation_size,
        seed=config.seed,
        source=config.source,
        data_dir=config.data_dir,
        max_length=config.max_length,
    )


def run_backbone(config: RunConfig, device: str | None) -> PreTrainedModel:
    """Load a run's backbone onto `device`, the CPU if none."""
    return load_backbone(config.backbone, config.dtype, device=device, attention=config.attention)


def load_untouched(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a run's backbone, as it is, onto the best device, and its tokenizer."""
    return run_backbone(config, best_device()), load_tokenizer(config.backbone)


def adapted(config: RunConfig, device: str | None) -> PreTrainedModel:
    """Load a run's backbone and adapt it: the same start on every device and in every process."""
    model = run_backbone(config, device)
    adapt(model, config.method, targets=config.targets, seed=config.seed, **config.adapter)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    return model


def optimiser_steps(config: RunConfig, data: TaskDataModule) -> int:
    """Return a run's number of optimiser steps: its own, or that of its epochs.

    Epochs come to ⌈epochs · train rows / batch size⌉ steps, which train as many rows as `epochs`
    passes hold. `StepBatches` drops the rows of a pass that do not fill a step; rows of the next
    pass take their place.
    """
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    rows = len(data.train_dataloader().examples)
    return -(-config.epochs * rows // config.batch_size)


def planned_steps(config: RunConfig) -> int:
    """Return a run's number of optimiser steps before anything is trained."""
    if config.steps is not None:
        return config.steps
    data = run_data(config)
    data.setup("fit")
    return optimiser_steps(config, data)


def train(
    config: RunConfig, run_dir: Path, model: PreTrainedModel, data: TaskDataModule
) -> LossHistory:
    """Train the model in place, from the last checkpoint in `run_dir` if there is one.

    Each of several processes calls this with the same arguments.
    """
    with part("training"), _attention(config, model, data):
        history = _train(config, run_dir, model, data)
    data.trainer = None  # from here on its rows are no longer shared with other processes
    if config.strategy != "fsdp":
        torch.nn.Module.to(model, best_device())  # the trainer hands it back on the CPU
    return history


def _attention(
    config: RunConfig, model: PreTrainedModel, data: TaskDataModule
) -> AbstractContextManager[None]:
    if config.attention is not None or best_device() != "cpu":
        return nullcontext()
    rows = data.train_dataloader().examples
    return training_attention(model, fmean(len(row.input_ids) for row in rows))


def _train(
    config: RunConfig, run_dir: Path, model: PreTrainedModel, data: TaskDataModule
) -> LossHistory:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only(_keep_log)(run_dir / "logs" / "metrics.csv")
    steps = optimiser_steps(config, data)
    module = FinetuneModule(
        model,
        config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        schedule=config.schedule,
        total_steps=steps,
        gradient_clip=config.gradient_clip,
        lora_plus_ratio=config.lora_plus_ratio,
        seed=config.seed,
        compile_backend=config.compile,
    )
    resume = ResumeCheckpoint(run_dir / "last.ckpt", config.checkpoint_interval)
    history = LossHistory()
    with warnings.catch_warnings():
        # Every process tokenised everything beforehand: there is nothing for workers to do.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        # That the log of the part before would be deleted: it has another name now.
        warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")
        trainer = Trainer(
            devices=config.devices,
            num_nodes=config.num_nodes,
            strategy=_strategy(config),
            # All processes validate all rows: a loss that is one device's, however many there are.
            use_distributed_sampler=False,
            inference_mode=config.strategy != "fsdp",
            max_steps=steps,
            val_check_interval=config.validation_interval or steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=CSVLogger(run_dir, name="", version="logs"),
            callbacks=[history, StepProgress(), resume],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=resume.latest(), weights_only=True)
    return history


def _keep_log(file: Path) -> None:
    """Move the log of an earlier part of the run aside, which Lightning's logger would delete."""
    if file.exists():
        earlier = len([*file.parent.glob("metrics.*.csv")])
        file.rename(file.with_name(f"metrics.{earlier + 1}.csv"))


def _strategy(config: RunConfig) -> Strategy | str:
    from lightning.pytorch.strategies import DDPStrategy

    if config.world_size == 1:
        return "auto"
    if config.strategy == "fsdp":
        return ShardedStrategy(config.world_size)
    return DDPStrategy(forward_sync_buffers=False)  # what moves them is summed over all processes
