"""Dropout on an adapter's input: one mask for all experts of a linear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class DropMask:
    """Which elements of one tensor are dropped, and the factor that keeps the mean.

    On the CPU `dropped` lists the places of the dropped elements, which are few; elsewhere, and
    under torch.compile, it is a boolean mask of the tensor's shape.
    """

    dropped: Tensor
    scale: float

    def zero_(self, x: Tensor) -> Tensor:
        """Zero the dropped elements of the contiguous `x` in place."""
        if self.dropped.dtype == torch.bool:
            return x.masked_fill_(self.dropped, 0)
        x.view(-1).index_fill_(0, self.dropped, 0)
        return x


def drop_mask(x: Tensor, p: float) -> DropMask:
    """Draw the elements of `x` that are dropped with probability `p`, 0 < p < 1, each by itself.

    On the CPU, drawing a number an element takes longer than the matmuls of a small adapter. The
    gaps between dropped elements are geometric, so one number for each dropped element does.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return DropMask(_dropped_places(x.numel(), p), 1 / (1 - p))
    return DropMask(torch.empty_like(x, dtype=torch.bool).bernoulli_(p), 1 / (1 - p))


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero elements with probability `p` and scale the rest to keep the mean; identity in eval."""
    if not training or p == 0:
        return x
    if torch.compiler.is_compiling():
        return functional.dropout(x, p)
    result: Tensor = _Drop.apply(x, drop_mask(x, p))  # type: ignore[no-untyped-call]
    return result


def _dropped_places(n: int, p: float) -> Tensor:
    """Return increasing places below `n`, each of which is in it with probability `p`."""
    parts: list[Tensor] = []
    last = -1
    while not parts or last < n - 1:
        expected = (n - 1 - last) * p
        draws = torch.rand(math.ceil(expected + 4 * math.sqrt(expected)) + 1, dtype=torch.float32)
        gaps = draws.neg_().log1p_().mul_(1 / math.log1p(-p)).to(torch.int64)
        parts.append(gaps.add_(1).cumsum_(0).add_(last))
        last = int(parts[-1][-1])
    places = torch.cat(parts) if len(parts) > 1 else parts[0]
    return places[: int(torch.searchsorted(places, n))]


class _Drop(torch.autograd.Function):
    """Zero and scale, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: DropMask) -> Tensor:
        """Return x·scale, with zeros where it is dropped."""
        ctx.save_for_backward(mask.dropped)
        ctx.scale = mask.scale
        return _masked(x, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Send the gradient the same way."""
        (dropped,) = ctx.saved_tensors
        return _masked(gradient, DropMask(dropped, ctx.scale)), None


def _masked(x: Tensor, mask: DropMask) -> Tensor:
    return mask.zero_((x * mask.scale).contiguous())
