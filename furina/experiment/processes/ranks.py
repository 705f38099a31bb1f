"""This process as one of several that torchrun has started to train together."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn

from furina.errors import ConfigurationError
from furina.kernels.processor import use_cores
from furina.model.parameters import adapter_state_dict


class Gathered(NamedTuple):
    """What the processes have together when the training is over."""

    tensors: dict[str, Tensor]
    """The adapter's whole tensors, on the CPU."""
    peak_memory_bytes: int
    """Of the process that needed most."""


def is_rank() -> bool:
    """Return whether torchrun has started this process."""
    return distributed.is_torchelastic_launched()


def require_world(size: int) -> None:
    """Raise ConfigurationError unless torchrun has started as many processes."""
    started = int(os.environ["WORLD_SIZE"])
    if started != size:
        raise ConfigurationError(
            f"torchrun has started {started} processes for {size} devices: set devices and "
            "num_nodes to what it was given."
        )


def take_place() -> int:
    """Select this process's device, or its share of the threads, and return its rank."""
    if torch.accelerator.is_available():
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    else:
        use_cores(processes=int(os.environ["LOCAL_WORLD_SIZE"]))
    return int(os.environ["RANK"])


def leave(model: nn.Module, peak_memory_bytes: int) -> Gathered:
    """Gather what the training made and end the group; all processes call it.

    Afterwards the processes are independent: none can wait for another.
    """
    tensors = {name: tensor.cpu() for name, tensor in adapter_state_dict(model).items()}
    peaks = [0] * distributed.get_world_size()
    distributed.all_gather_object(peaks, peak_memory_bytes)
    distributed.destroy_process_group()
    return Gathered(tensors, max(peaks))
