"""Dropout on an adapter's input: one mask for all experts of a linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_LEVELS = 2**16
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer type that is as wide as an element."""


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
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - _LEVELS // 2
    bits = kept.to(_BITS[x.element_size()]).neg_()
    scale = _LEVELS / (_LEVELS - threshold)
    result: Tensor = _Drop.apply(x, bits, scale)  # type: ignore[no-untyped-call]
    return result


class _Drop(torch.autograd.Function):
    """Zero and scale in two passes, and again in the backward.

    An element is zeroed by a bitwise "and" with all zeros or all ones, which is ten times as fast
    as `masked_fill`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scale: float) -> Tensor:
        """Return x·scale where `bits` are ones, else 0."""
        ctx.save_for_backward(bits)
        ctx.scale = scale
        return _masked(x, bits, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Send the gradient the same way."""
        (bits,) = ctx.saved_tensors
        return _masked(gradient, bits, ctx.scale), None, None


def _masked(x: Tensor, bits: Tensor, scale: float) -> Tensor:
    return (x.contiguous().view(bits.dtype) & bits).view(x.dtype).mul_(scale)
