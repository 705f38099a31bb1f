"""Dropout on an adapter's input: one mask for all experts of a linear."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def draw_dropped(x: Tensor, p: float) -> Tensor:
    """Draw which elements of `x` are dropped, each by itself with probability `p`, 0 < p < 1.

    On the CPU the places of the few dropped elements, increasing; there, drawing a number for every
    element takes longer than the matmuls of a small adapter. Elsewhere, and under torch.compile, a
    boolean mask of x's shape.
    """
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _dropped_places(x.numel(), p)
    return torch.empty_like(x, dtype=torch.bool).bernoulli_(p)


def drop_(x: Tensor, dropped: Tensor) -> Tensor:
    """Zero the dropped elements of the contiguous `x` in place."""
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped, 0)
    x.view(-1).index_fill_(0, dropped, 0)
    return x


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements with probability `p` and scale the rest to keep the mean."""
    if p == 0:
        return x
    result: Tensor = _Drop.apply(x, draw_dropped(x, p), 1 / (1 - p))  # type: ignore[no-untyped-call]
    return result


def _dropped_places(n: int, p: float) -> Tensor:
    """Return increasing places below `n`; the gaps between them are geometric."""
    parts: list[Tensor] = []
    last = -1
    while not parts or last < n - 1:
        expected = (n - 1 - last) * p
        count = math.ceil(expected + 4 * math.sqrt(expected)) + 1
        draws = torch.rand(count, dtype=torch.float32, device="cpu")
        gaps = draws.neg_().log1p_().mul_(1 / math.log1p(-p)).to(torch.int64)
        parts.append(gaps.add_(1).cumsum_(0).add_(last))
        last = int(parts[-1][-1])
    places = torch.cat(parts) if len(parts) > 1 else parts[0]
    return places[: int(torch.searchsorted(places, n))]


class _Drop(torch.autograd.Function):
    """Scale and zero, and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor, scale: float) -> Tensor:
        """Return x·scale, with zeros where it is dropped."""
        ctx.save_for_backward(dropped)
        ctx.scale = scale
        return drop_((x * scale).contiguous(), dropped)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Send the gradient the same way."""
        (dropped,) = ctx.saved_tensors
        return drop_((gradient * ctx.scale).contiguous(), dropped), None, None
