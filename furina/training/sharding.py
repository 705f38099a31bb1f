"""FSDP2 under Lightning: weights, gradients and optimiser state in parts, one on each device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from furina.errors import ConfigurationError
from furina.kernels.sharding import part, whole


class ShardedStrategy(ModelParallelStrategy):
    """Train with a model of which each of `world_size` processes holds a part (FSDP2).

    ```python
    Trainer(strategy=ShardedStrategy(2), devices=2, inference_mode=False).fit(module, data)
    ```

    A decoder layer is whole while it runs, so its row norms, directions and custom backwards see
    whole weights; frozen bf16 and trained fp32 parameters share a group. The adapter is made before
    the model is sharded, by the same seed as on one device, so every process first reads the whole
    backbone into the machine's memory. Gradients are averaged as by DDP. Every registered method
    trains so; `torch.compile` does not, as FSDP2's hooks break its graph.

    A checkpoint is that of one device: a plain file of whole tensors, which rank 0 writes through
    the trainer's CheckpointIO, and with which any number of devices goes on.
    """

    def __init__(self, world_size: int) -> None:
        """Prepare for so many processes, over all machines."""
        super().__init__(
            data_parallel_size=world_size,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let the trainer load the optimiser's state, through `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the adapter's whole tensors; all processes must ask for them."""
        return Strategy.lightning_module_state_dict(self)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read the file on every process."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this process's part of the adapter."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the optimiser's state in whole tensors; all processes must ask for it."""
        saved: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        return {**saved, "state": {n: _whole(state) for n, state in saved["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Copy this process's part of the optimisers' states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            parts = {n: _part(state, parameters[n]) for n, state in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": parts})


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every decoder layer of the adapted `model`, and what is outside them; once.

    Raises ConfigurationError for a model that does not name its layers' class.
    """
    if isinstance(model, FSDPModule):
        return
    layers = list(_decoder_layers(model))
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} names no decoder layer (_no_split_modules), which could be "
            "sharded: use strategy ddp."
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    names = getattr(model, "_no_split_modules", None) or ()
    return (module for module in model.modules() if type(module).__name__ in names)


def _whole(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: whole(v) if isinstance(v, Tensor) else v for key, v in state.items()}


def _part(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return the part of a parameter's state; a counter of steps is whole everywhere."""
    return {
        key: part(v, parameter) if isinstance(v, Tensor) and v.shape == parameter.shape else v
        for key, v in state.items()
    }
