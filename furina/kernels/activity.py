"""How active FURINA's experts are on each token, and what of that the selection loss needs.

    |Ŵ_i x|² = h_iᵀ M_i h_i,   h_i = A_i x,   M_i = B_iᵀ diag(d̃_i)^-2 B_i

Shape legend: T tokens, N experts, R routed, r rank of one expert, U output units apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DENSE = 256
"""Up to so many columns one product with a block-diagonal matrix beats one for each block."""
CHUNK = 4
"""Linears whose activity is computed together: few calls, and little memory at a time."""


def l2_activity(
    h: tuple[Tensor, ...], gram: tuple[Tensor, ...], eps: float, has_gradient: Tensor
) -> Tensor:
    """Return n = sqrt(|Ŵ_i x|² + ε²) of several linears in M's dtype.

    There is no gradient where `has_gradient` is false.
    Shape: h (T, N·r) and M (N, r, r) of each linear, has_gradient (linears,) → (linears, T, N).
    """
    activity: Tensor = _Activity.apply(eps, has_gradient, *h, *gram)  # type: ignore[no-untyped-call]
    return activity


def selection_sums(activity: Tensor, mask: Tensor | None, top_k: int) -> Tensor:
    """Return each linear's sums over real tokens of [Σ_topK p_t, p_t (R), 1[i ∈ top K] (R)].

    p are the experts' shares of activity; with the activity of U units apart, means over these.
    Shape: activity (linears, T, U, R), mask (T, 1) → (linears, 1 + 2R).
    """
    p = activity / activity.sum(-1, keepdim=True)
    top = p.topk(top_k, dim=-1)
    chosen = torch.zeros_like(p).scatter(-1, top.indices, 1.0)
    real = p.new_ones(p.shape[1]) if mask is None else mask.squeeze(1).to(p.dtype)
    real = real / p.shape[2]
    share = torch.einsum("t,ltu->l", real, top.values.sum(-1))
    shares, counts = (torch.einsum("t,ltur->lr", real, each) for each in (p, chosen))
    return torch.cat([share[:, None], shares, counts], dim=1)


def selection_losses(means: Tensor, top_k: int) -> Tensor:
    """Return L_div + L_bal of each linear from its `selection_sums` divided by T real tokens.

    L_div = 1 − share; L_bal = R Σ_i F_i P_i with F_i = count_i/K and P_i = p_i, which is 1 at
    balance (section 3.3 of the paper; the definitions are our reading of its words).
    Shape: (linears, 1 + 2R) → (linears,).
    """
    r = means.shape[1] // 2
    share, p, count = torch.split(means, [1, r, r], dim=1)
    return 1 - share[:, 0] + r * (count / top_k * p).sum(1)


class _Activity(torch.autograd.Function):
    """sqrt(max(h_iᵀ M_i h_i, 0) + ε²), some linears at a time; products in h's dtype."""

    @staticmethod
    def forward(ctx: Any, eps: float, has_gradient: Tensor, *tensors: Tensor) -> Tensor:
        """Multiply each expert's part of h with M on both sides."""
        linears, n = len(tensors) // 2, len(tensors[-1])
        activity = tensors[-1].new_empty(linears, len(tensors[0]), n)
        for some in _chunks(linears):
            h, blocks = _stacked(tensors, some)
            product = _by_expert(_block_product(h, blocks).mul_(h), n)
            torch.sum(product, -1, dtype=activity.dtype, out=activity[some])
        activity.clamp_(min=0).add_(eps**2).sqrt_()
        ctx.save_for_backward(*tensors, activity, has_gradient)
        return activity

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Use ∂(hᵀ M h)/∂h = 2 M h and ∂/∂M = h hᵀ; M is symmetric."""
        tensors, (activity, has_gradient) = ctx.saved_tensors[:-2], ctx.saved_tensors[-2:]
        linears, n = len(tensors) // 2, len(tensors[-1])
        gradient = gradient * has_gradient[:, None, None] / activity
        grad_h: list[Tensor] = []
        grad_gram: list[Tensor] = []
        for some in _chunks(linears):
            h, blocks = _stacked(tensors, some)
            weighted = (_by_expert(h, n) * gradient[some][..., None]).flatten(-2).to(h.dtype)
            grad_h += _block_product(weighted, blocks).to(tensors[0].dtype).unbind()
            grad_gram += _blocks_of_outer(weighted, h, n).to(gradient.dtype).div_(2).unbind()
        return None, None, *grad_h, *grad_gram


def _by_expert(h: Tensor, n: int) -> Tensor:
    """View (…, N·r) as (…, N, r)."""
    return h.view(*h.shape[:-1], n, -1)


def _chunks(linears: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, linears, CHUNK))


def _stacked(tensors: tuple[Tensor, ...], some: slice) -> tuple[Tensor, Tensor]:
    """Return some linears' h (linears, T, N·r) and M (linears, N, r, r).

    In fp32 for fp16, whose range the sums over O in M leave.
    """
    half = len(tensors) // 2
    h, gram = torch.stack(tensors[:half][some]), torch.stack(tensors[half:][some])
    h = h.to(gram.dtype) if h.dtype == torch.float16 else h
    return h, gram.to(h.dtype)


def _block_product(h: Tensor, blocks: Tensor) -> Tensor:
    """Multiply each expert's part with its block.

    Shape: (…, T, N·r), (…, N, r, r) → (…, T, N·r).
    """
    n, r = blocks.shape[-3:-1]
    if n * r > DENSE:
        return (_by_expert(h, n).transpose(-2, -3) @ blocks).transpose(-2, -3).flatten(-2)
    dense = blocks.new_zeros(*blocks.shape[:-3], n, r, n, r)
    dense.diagonal(dim1=-4, dim2=-2).copy_(blocks.movedim(-3, -1))
    return h @ dense.flatten(-2).flatten(-3, -2)


def _blocks_of_outer(left: Tensor, right: Tensor, n: int) -> Tensor:
    """Return leftᵀ right of each expert. Shape: (…, T, N·r) twice → (…, N, r, r)."""
    if left.shape[-1] > DENSE:
        left, right = (_by_expert(m, n).transpose(-2, -3) for m in (left, right))
        return left.mT @ right
    outer = left.mT @ right
    rank = left.shape[-1] // n
    outer = outer.view(*outer.shape[:-2], n, rank, n, rank)
    return outer.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
