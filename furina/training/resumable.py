"""What a training checkpoint holds beside the optimiser, and what it may be resumed by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchmetrics.aggregation import RunningMean

from furina.data.module import TaskDataModule
from furina.errors import ConfigurationError, require_same
from furina.kernels.sharding import whole, write
from furina.model.also_trained import also_trained
from furina.model.parameters import adapter_state_dict, load_adapter_state_dict
from furina.model.state import state_of
from furina.training.divergence import DivergenceWatch
from furina.training.schedule import schedule_length

RUNNING_WINDOW = 20
"""Optimiser steps averaged in `train/loss_running`."""


class ResumableModule(pl.LightningModule):
    """Save what is trained of `model`, and go on with it under the same settings alone."""

    def __init__(self, model: nn.Module) -> None:
        """Wrap an adapted model."""
        super().__init__()
        self.model = model
        self._watch = DivergenceWatch()
        self._resumed: dict[str, Any] = {}
        self._beside: dict[str, nn.Parameter] = {}
        self._running_loss = RunningMean(RUNNING_WINDOW, nan_strategy="disable")
        self._running_loss.sync_on_compute = False
        self._running_loss.persistent(True)

    def on_train_start(self) -> None:
        """Refuse to go on from a checkpoint of a run with other settings."""
        self._beside = trained_beside(self.model)
        if self._resumed:
            own = self._settings()
            unsaid = own.keys() - self.hparams.keys() - self._resumed.keys()  # by older checkpoints
            require_same("run", self._resumed, {key: own[key] for key in own.keys() - unsaid})

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return what is trained only; the frozen backbone has a file of its own."""
        state = {} if destination is None else destination
        beside = {name: whole(p.detach()) for name, p in trained_beside(self.model).items()}
        for name, tensor in {**adapter_state_dict(self.model), **beside}.items():
            state[f"{prefix}model.{name}"] = tensor
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copy what is trained, always strictly; raises ConfigurationError on a mismatch."""
        state = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        beside = trained_beside(self.model)
        own = {name: state.pop(name) for name in beside if name in state}
        _require_held(beside, own)
        load_adapter_state_dict(self.model, state)
        with torch.no_grad():
            for name, parameter in beside.items():
                write(parameter, own[name])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings, the adapter's config and the running loss; never save NaN weights."""
        self._watch.check()
        checkpoint["furina"] = {
            "adapter": _adapter_config(self.model),
            "settings": self._settings(),
            "running_loss": self._running_loss.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another adapter's checkpoint; restore the running loss."""
        if "furina" not in checkpoint:
            raise ConfigurationError("The checkpoint was not written by furina's FinetuneModule.")
        resumes = self._trainer is not None and self.trainer.state.fn == "fit"
        if resumes and "optimizer_states" not in checkpoint:
            raise ConfigurationError(
                "The checkpoint holds weights only, so no training can go on from it: start a new "
                "one with FinetuneModule.load_from_checkpoint(path, model=…)."
            )
        saved = checkpoint["furina"]
        require_same("adapter", saved["adapter"], _adapter_config(self.model))
        self._resumed = saved["settings"]
        self._running_loss.load_state_dict(saved["running_loss"])
        self._running_loss._num_vals_seen = checkpoint["global_step"]
        self._running_loss._update_count = checkpoint["global_step"]

    def _settings(self) -> dict[str, Any]:
        """Return what a resumed run must have in common with the one that wrote the checkpoint."""
        own = dict(self.hparams)
        total = schedule_length(own["schedule"], own["total_steps"], self.trainer)
        # Another batch size or other data show, mostly, in the number of batches.
        own |= {"total_steps": total, "batches_per_epoch": self.trainer.num_training_batches}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TaskDataModule):
            own |= {f"data.{name}": value for name, value in data.settings.items()}
        return own


def _adapter_config(model: nn.Module) -> dict[str, Any]:
    state = state_of(model)
    own = {"method": state.config.name, **state.config.to_dict(), "targets": list(state.targets)}
    beside = list(trained_beside(model))
    return {**own, "trained_beside": beside} if beside else own


def trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what of the backbone requires a gradient, such as an unfrozen head, by its plain name.

    Raises ConfigurationError as `also_trained`, and for numbers of 16 bits, in which small updates
    vanish.
    """
    others = also_trained(model).items()
    found = {n: p for n, p in others if isinstance(p, nn.Parameter) and p.requires_grad}
    for name, parameter in found.items():
        if parameter.dtype.itemsize < torch.float32.itemsize:
            raise ConfigurationError(
                f"{name} requires a gradient in {parameter.dtype}, in which small updates vanish: "
                "load the backbone in float32 (Trainer(precision='bf16-mixed') computes in less)."
            )
    return found


def _require_held(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Raise ConfigurationError where `state` lacks one of `parameters`, or its shape."""
    for name, parameter in parameters.items():
        if name not in state or state[name].shape != parameter.shape:
            raise ConfigurationError(
                f"The checkpoint holds no {name} of shape {tuple(parameter.shape)}, which is "
                "trained here: freeze it, or train the same parameters as then."
            )
