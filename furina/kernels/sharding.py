"""Tensors of which each process holds a part (DTensors, as FSDP2 makes them), and whole ones."""

from __future__ import annotations

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds a part of `tensor` only."""
    return hasattr(tensor, "full_tensor")  # to import DTensor takes as long as to import torch


def whole(tensor: Tensor) -> Tensor:
    """Return `tensor` itself, or gathered from all processes, which must all ask for it."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def part(value: Tensor, like: Tensor) -> Tensor:
    """Return the whole `value` itself, or the part of it that is held here, sharded as `like` is.

    Nothing is sent: every process has the value.
    """
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def write(target: Tensor, value: Tensor) -> None:
    """Copy the whole `value` into `target`, or the part of it that is held here."""
    target.copy_(part(value.detach(), target))
