"""Dropout on an adapter's input: one mask for all experts of a linear."""

from __future__ import annotations

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
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= threshold - _LEVELS // 2
    return x * (kept.to(x.dtype) * (_LEVELS / (_LEVELS - threshold)))
