"""Fine-tune as a config says; a killed run goes on where its last checkpoint stands."""

from __future__ import annotations

import json
import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import torch

from furina.auxiliary import record_selection
from furina.backbones import best_device, load_backbone, load_tokenizer
from furina.checkpoint import load, save
from furina.compilation import require_backend
from furina.data.batches import Batch
from furina.data.module import TaskDataModule
from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.inject import adapt, describe, state_of
from furina.mode import evaluation_mode
from furina.records import Training, codec, peak_memory_bytes
from furina.storage import write_json
from furina.training import (
    FinetuneModule,
    LossHistory,
    ResumeCheckpoint,
    gradient_ratio,
    training_attention,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("furina")

RATIO_WINDOWS = 3
"""Optimiser steps after the last one on whose batches the gradient ratio is measured."""


@dataclass(frozen=True)
class Fitted:
    """A fine-tuned model, the questions it was trained and validated on, and what it cost."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TaskDataModule
    training: Training


def fit(config: RunConfig, run_dir: Path) -> Fitted:
    """Fine-tune into `run_dir`: `adapter/`, `training.json`, `config.json` and CSV logs.

    A finished run is loaded, an interrupted one resumed bit for bit. Raises ConfigurationError if
    `run_dir` belongs to another config.
    """
    if config.is_base:
        raise ConfigurationError("method base has nothing to fit: choose one of `furina methods`.")
    config.check_tasks()
    config.adapter_config()
    if config.compile:
        require_backend(config.compile)
    tokenizer = load_tokenizer(config.backbone)
    model = load_backbone(
        config.backbone, config.dtype, device=best_device(), attention=config.attention
    )
    data = _data(config, tokenizer)
    finished = run_dir / "training.json"
    if finished.exists():
        claim(config, run_dir)
        load(run_dir / "adapter", model)
        data.setup("fit")
        training: Training = codec.decode(
            Training, json.loads(finished.read_text(encoding="utf-8")), str(finished)
        )
        return Fitted(model, tokenizer, data, training)
    adapt(model, config.method, targets=config.targets, seed=config.seed, **config.adapter)
    data.setup("fit")
    claim(config, run_dir)  # only now: a config that cannot run must not own the folder
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    with _attention(config, model, data):
        history = _train(config, run_dir, model, data)
    training = _summary(config, model, data, history)
    save(model, run_dir / "adapter")
    write_json(finished, asdict(training))
    (run_dir / "last.ckpt").unlink(missing_ok=True)
    return Fitted(model, tokenizer, data, training)


def claim(config: RunConfig, run_dir: Path) -> None:
    """Write the config into `run_dir`, or check that it is the one already there."""
    file = run_dir / "config.json"
    own = json.loads(json.dumps(config.to_dict()))
    if not file.exists():
        write_json(file, own)
        return
    saved = json.loads(file.read_text(encoding="utf-8"))
    different = sorted(key for key in {**saved, **own} if saved.get(key) != own.get(key))
    if different:
        raise ConfigurationError(
            f"{run_dir} holds a run with other settings ({', '.join(different)}): choose another "
            "--run-dir, or delete that folder."
        )


def _data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TaskDataModule:
    return TaskDataModule(
        tokenizer,
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


def _attention(
    config: RunConfig, model: PreTrainedModel, data: TaskDataModule
) -> AbstractContextManager[None]:
    if config.attention is not None:
        return nullcontext()
    rows = data.train_dataloader().examples
    return training_attention(model, fmean(len(row.input_ids) for row in rows))


def _train(
    config: RunConfig, run_dir: Path, model: PreTrainedModel, data: TaskDataModule
) -> LossHistory:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger

    module = FinetuneModule(
        model,
        config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        schedule=config.schedule,
        total_steps=config.steps,
        gradient_clip=config.gradient_clip,
        lora_plus_ratio=config.lora_plus_ratio,
        seed=config.seed,
        compile_backend=config.compile,
    )
    resume = ResumeCheckpoint(run_dir / "last.ckpt", config.checkpoint_interval)
    history = LossHistory()
    with warnings.catch_warnings():
        # One process that tokenised everything beforehand has nothing for workers to do.
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        trainer = Trainer(
            max_steps=config.steps,
            val_check_interval=config.validation_interval or config.steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            logger=CSVLogger(run_dir, name="", version="logs"),
            callbacks=[history, TQDMProgressBar(refresh_rate=5), resume],
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=resume.latest(), weights_only=True)
    torch.nn.Module.to(model, best_device())  # the trainer hands it back on the CPU
    return history


def _summary(
    config: RunConfig, model: PreTrainedModel, data: TaskDataModule, history: LossHistory
) -> Training:
    counts = describe(model)
    return Training(
        steps=config.steps,
        seconds=history.seconds,
        peak_memory_bytes=peak_memory_bytes(),
        trainable=counts.trainable,
        trainable_without_router=counts.trainable_without_router,
        total=counts.total,
        final_loss=history.training[-1][1],
        loss_curve=tuple(history.training),
        validation_curve=tuple(history.validation),
        gradient_ratio=_gradient_ratio(config, model, data),
        selection=_selection(model, data),
    )


def _gradient_ratio(
    config: RunConfig, model: PreTrainedModel, data: TaskDataModule
) -> float | None:
    """Return the median ‖∇aux‖/‖∇task‖ over the batches that would have come next."""
    if not state_of(model).config.has_auxiliary_loss:
        return None
    batches = data.train_dataloader()
    ratios = [
        gradient_ratio(model, [_on(model, batch) for batch in batches.window(step)])["ratio"]
        for step in range(config.steps, config.steps + RATIO_WINDOWS)
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    return median(known) if known else None


@torch.inference_mode()
def _selection(model: PreTrainedModel, data: TaskDataModule) -> dict[str, float] | None:
    """Return the held-out top-K share as a mean over the adapted linears."""
    loaders: list[Any] = data.val_dataloader()
    if not state_of(model).config.records_selection or not loaders:
        return None
    with evaluation_mode(model), record_selection(model) as record:
        for batch in loaders[0]:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            model(**_on(model, inputs), use_cache=False, logits_to_keep=1)
    return {"top_k_share": record.mean_top_k_share()}


def _on(model: PreTrainedModel, batch: Batch) -> Batch:
    return {key: tensor.to(model.device) for key, tensor in batch.items()}
