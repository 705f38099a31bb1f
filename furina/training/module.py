"""The LightningModule that fine-tunes any adapted causal LM; it knows no method by name."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics.aggregation import SumMetric

from furina.errors import ConfigurationError, DataError
from furina.kernels.sharding import whole
from furina.model.accumulation import accumulating
from furina.model.auxiliary import after_step, auxiliary_loss
from furina.model.compilation import CompiledDecoder
from furina.model.parameters import adapter_parameters, parameter_groups
from furina.model.state import state_of
from furina.training.divergence import DivergenceWatch
from furina.training.loss import (
    AnswerBatch,
    LossWeights,
    answer_logits,
    loss_weights,
    mean_nll,
    select_answers,
)
from furina.training.preconditions import (
    refuse_callbacks,
    refuse_ignored_options,
    refuse_other_uses,
    refuse_unsharded_options,
    require_trainable,
)
from furina.training.resumable import ResumableModule
from furina.training.schedule import Schedule, learning_rate_factor, step_seed
from furina.training.sharding import ShardedStrategy, shard


class FinetuneModule(ResumableModule):
    """Train the adapter of `model` on the answer tokens, plus its method's auxiliary loss.

    One Lightning batch is one optimiser step: a list of micro-batches, or a single one, each a dict
    of `input_ids`, `attention_mask` and `labels` (-100 except on the answer). Over a step's
    micro-batches m and over all ranks it minimises

        L = Σ_m (n_m / Σ n) L_task,m + Σ_m (t_m / Σ t) L_aux,m

    with n answer tokens and t real tokens, so neither padding nor the cut into micro-batches
    changes a token's weight in the task loss. Dropout depends on `seed`, step and rank alone.

    What else of the model requires a gradient when `fit` begins, such as an unfrozen head or new
    embeddings, is trained beside the adapter, at `learning_rate` and without weight decay, and is
    part of its checkpoints.

    ```python
    module = FinetuneModule(furina.adapt(model, "furina", rank=8), learning_rate=2e-4)
    Trainer(max_steps=100).fit(module, data)
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        schedule: Schedule = "linear",
        total_steps: int | None = None,
        gradient_clip: float | None = 1.0,
        lora_plus_ratio: float = 1.0,
        seed: int = 0,
        compile_backend: str | None = None,
    ) -> None:
        """Wrap an adapted model.

        `total_steps` is the length of the schedule, by default the Trainer's own; `gradient_clip`
        bounds the global norm of the gradient, None leaves it alone. `compile_backend`, such as
        "inductor", compiles the training forwards; see `CompiledDecoder`.
        Raises ConfigurationError if the model is not adapted or a setting is out of range.
        """
        super().__init__(model)
        state_of(model)
        _require(learning_rate > 0, "learning_rate", learning_rate, "positive")
        _require(weight_decay >= 0, "weight_decay", weight_decay, "0 or larger")
        _require(warmup_steps >= 0, "warmup_steps", warmup_steps, "0 or larger")
        _require(lora_plus_ratio > 0, "lora_plus_ratio", lora_plus_ratio, "positive")
        clips = gradient_clip is None or gradient_clip > 0
        _require(clips, "gradient_clip", gradient_clip, "positive, or None for no clipping")
        learning_rate_factor(schedule, 0, 1)
        self.save_hyperparameters(ignore=["model", "compile_backend"])
        self.automatic_optimization = False
        self._compiled = (
            None if compile_backend is None else CompiledDecoder(model, compile_backend)
        )
        self._validation_loss = SumMetric(nan_strategy="disable")
        self._validation_hits = SumMetric(nan_strategy="disable")
        self._validation_tokens = SumMetric(nan_strategy="disable")

    def configure_callbacks(self) -> list[pl.Callback]:
        """Refuse what would be ignored, train wrongly or fail later; adds no callback."""
        refuse_other_uses(self.trainer, compiled=self._compiler_ctx is not None)
        refuse_callbacks(self.trainer)
        refuse_ignored_options(self.trainer)
        refuse_unsharded_options(self.trainer, compiled=self._compiled is not None)
        return []

    def configure_model(self) -> None:
        """Shard the model if the strategy does so."""
        if self._trainer is None:  # as `load_from_checkpoint` calls it
            return
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            shard(self.model, strategy.device_mesh["data_parallel"])

    def setup(self, stage: str) -> None:
        """Forget an earlier fit; silence Lightning's warning that one hook hides another."""
        self._resumed, self._watch = {}, DivergenceWatch()
        self._running_loss.reset()
        warnings.filterwarnings("ignore", ".*`on_before_batch_transfer` in `LightningModule` but")

    def on_fit_start(self) -> None:
        """Switch the model to training mode, which `from_pretrained` leaves in eval mode.

        Raises ConfigurationError where ranks hold the backbone in several dtypes.
        """
        require_trainable(self.model)
        own = str(next(iter(state_of(self.model).layers.values())).base.weight.dtype)
        first = self.trainer.strategy.broadcast(own)
        if own != first:
            raise ConfigurationError(
                f"Rank {self.global_rank} holds the backbone in {own}, rank 0 in {first}: name one "
                "dtype for all, such as float32."
            )
        self.model.train()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return AdamW over the adapter's groups and what is trained beside it, and a schedule.

        A subclass may return another optimiser, with a scheduler that is stepped after each step.
        """
        self._require_warmup_to_end()
        own = self.hparams
        groups = parameter_groups(
            self.model, own["learning_rate"], own["weight_decay"], own["lora_plus_ratio"]
        )
        device = groups[0]["params"][0].device
        optimizer = AdamW(groups, fused=device.type in ("cpu", "cuda"))
        factor = functools.partial(
            learning_rate_factor,
            self.hparams["schedule"],
            total_steps=self._settings()["total_steps"],
            warmup_steps=self.hparams["warmup_steps"],
        )
        scheduler = LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Locate the answer tokens while the batch is still on the CPU."""
        return _located(batch) if self.trainer.training else select_answers(batch)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Do one optimiser step over the micro-batches of `batch`; returns its loss.

        "auxiliary" is the part of "loss" that is not the task's.
        """
        done = self.trainer.global_step
        torch.manual_seed(step_seed(self.hparams["seed"], done, self.global_rank))
        optimizer, scheduler = self._optimisation()
        optimizer.zero_grad()
        window, parts = _located(batch), []
        with self._accumulation(len(window)), self._compilation():
            for micro, weights in zip(window, self._weights(window), strict=True):
                with self._gradient_sync(micro is window[-1]):
                    parts.append(self._backward(micro, weights))
        norm = self._clip()
        sums = functools.reduce(torch.add, parts)
        loss = self._log_step(sums, norm, scheduler)
        self._watch.note(done + 1, loss, norm)
        if loss.device.type == "cpu" or self._logs_now():
            self._watch.check()
        optimizer.step()
        after_step(self.model)
        scheduler.step()
        return {"loss": loss, "auxiliary": sums[2]}

    def on_validation_epoch_start(self) -> None:
        """Start the sums; here, as what inference mode made cannot be added to in training."""
        for metric in (self._validation_loss, self._validation_hits, self._validation_tokens):
            metric.reset()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a micro-batch, of whichever loader, to the token-weighted loss and accuracy."""
        logits, targets = answer_logits(self.model, batch)
        self._validation_loss.update(mean_nll(logits, targets) * len(targets))
        self._validation_hits.update((logits.argmax(-1) == targets).sum())
        self._validation_tokens.update(len(targets))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all answer tokens of the validation set, on all ranks."""
        tokens = self._validation_tokens.compute()
        if not tokens:
            raise DataError("The validation batches have no answer token: every label is -100.")
        loss, accuracy = (
            metric.compute() / tokens for metric in (self._validation_loss, self._validation_hits)
        )
        self.log("validation/loss", loss, prog_bar=True, sync_dist=True)
        self.log("validation/accuracy", accuracy, sync_dist=True)

    def on_train_end(self) -> None:
        """Report a divergence that no logging step has looked at."""
        self._watch.check()

    def _weights(self, window: list[AnswerBatch]) -> list[LossWeights]:
        if self.trainer.world_size == 1:
            return loss_weights(window, None)
        return loss_weights(window, lambda counts: self._sum_over_ranks(counts.to(self.device)))

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        total = self.trainer.strategy.reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _accumulation(self, micro_batches: int) -> AbstractContextManager[None]:
        """Make norms and the like once for several micro-batches, but where ranks share a model."""
        alone = not isinstance(self.trainer.strategy, ParallelStrategy)
        return accumulating(self.model) if alone and micro_batches > 1 else nullcontext()

    def _compilation(self) -> AbstractContextManager[None]:
        return nullcontext() if self._compiled is None else self._compiled.active()

    def _gradient_sync(self, last: bool) -> AbstractContextManager[None]:
        """Let the ranks exchange gradients in the last backward of a step only."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            return nullcontext()
        block: AbstractContextManager[None] = strategy.block_backward_sync()
        return block

    def _backward(self, micro: AnswerBatch, weights: LossWeights) -> Tensor:
        """Add a micro-batch's gradient; returns its part of [task loss, accuracy, auxiliary]."""
        logits, targets = answer_logits(self.model, micro)
        task = weights.task * mean_nll(logits, targets)
        auxiliary = weights.auxiliary * auxiliary_loss(self.model)
        # DDP and FSDP2 average over the ranks but the loss is their sum; the auxiliary loss's own
        # all-reduce has put that factor into its gradient already.
        self.manual_backward(self.trainer.world_size * task + auxiliary)
        hits = (logits.argmax(-1) == targets).sum() * (weights.task / max(len(targets), 1))
        return torch.stack([task.detach(), hits, auxiliary.detach()])

    def _clip(self) -> Tensor:
        """Clip the global gradient norm; returns the norm before that."""
        parameters = [*adapter_parameters(self.model).values(), *self._beside.values()]
        norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        if self.hparams["gradient_clip"] is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.hparams["gradient_clip"], norm)
        return norm

    def _log_step(self, sums: Tensor, norm: Tensor, scheduler: LRScheduler) -> Tensor:
        """Log the step's figures, over all ranks; returns the step's loss."""
        task, accuracy = self._sum_over_ranks(sums[:2]).unbind()
        loss = task + sums[2]
        self._running_loss.update(loss)
        # The bar shows the part that compares with the validation loss, and the other by its name.
        self.log("train/loss_task", task, prog_bar=True)
        pulls = state_of(self.model).config.has_auxiliary_loss
        self.log("train/loss_auxiliary", sums[2], prog_bar=pulls)
        self.log_dict(
            {
                "train/loss": loss,
                "train/loss_running": self._running_loss.compute(),
                "train/accuracy": accuracy,
                "train/gradient_norm": norm,
                "train/learning_rate": scheduler.get_last_lr()[0],
            }
        )
        return loss

    def _optimisation(self) -> tuple[LightningOptimizer, LRScheduler]:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        if (
            isinstance(optimizer, LightningOptimizer)
            and isinstance(scheduler, LRScheduler)
            and scheduler.optimizer is optimizer.optimizer
        ):
            return optimizer, scheduler
        raise ConfigurationError(
            "FinetuneModule trains with one optimiser and its own scheduler: return both from "
            "configure_optimizers of a subclass, and leave trainer.optimizers alone."
        )

    def _require_warmup_to_end(self) -> None:
        warmup, total = self.hparams["warmup_steps"], self.hparams["total_steps"] or 0
        steps = max(total, self.trainer.estimated_stepping_batches)
        if warmup > steps and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigurationError(
                f"warmup_steps={warmup} is more than the {steps} steps of the training, which "
                "would end before it has reached its learning rate: lower it."
            )

    def _logs_now(self) -> bool:
        interval: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return (self.trainer.global_step + 1) % max(interval, 1) == 0


def _located(batch: Any) -> list[AnswerBatch]:
    """Return the window's micro-batches with their answers located, whether they were or not."""
    window = [batch] if isinstance(batch, Mapping | AnswerBatch) else batch
    return [micro if isinstance(micro, AnswerBatch) else select_answers(micro) for micro in window]


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigurationError(f"{name}={value!r} must be {allowed}.")
