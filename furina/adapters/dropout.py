"""Dropout on an adapter's input: one mask for all experts of a linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LEVELS = 2**16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero elements with probability `p` and scale the rest to keep the mean; identity in eval.

    On the CPU, PyTorch draws one float an element, which takes longer than the matmuls of a small
    adapter. Here four elements share one 64-bit draw; p is rounded to a multiple of 2^-16.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return functional.dropout(x, p)
    threshold = min(round(p * _LEVELS), _LEVELS - 1)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    dropped = draws.view(torch.int16)[: x.numel()].view(x.shape) < threshold - _LEVELS // 2
    scale = _LEVELS / (_LEVELS - threshold)
    result: Tensor = _Drop.apply(x, dropped, scale)  # type: ignore[no-untyped-call]
    return result


class _Drop(torch.autograd.Function):
    """Zero and scale in two passes, and again in the backward; autograd would take six."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        """Return x·scale where not dropped, else 0."""
        ctx.save_for_backward(dropped)
        ctx.scale = scale
        return x.masked_fill(dropped, 0).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Send the gradient the same way."""
        (dropped,) = ctx.saved_tensors
        return gradient.masked_fill(dropped, 0).mul_(ctx.scale), None, None
