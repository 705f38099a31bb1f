"""FURINA's algebra of one linear: norms, directions and activities without a k×d product.

    d̃_i² = rowsum((B_i L_i)²) + ε²,  A_i A_iᵀ = L_i L_iᵀ  (with a Cholesky factor for stability)
    |Ŵ_i x|² = h_iᵀ M_i h_i,   M_i = B_iᵀ diag(d̃_i)^-2 B_i,   h_i = A_i x

All experts are worked on at once. B comes as Bᵀ (N·r, O): then every step is one pass along
contiguous rows, or one batched product. The shared experts, which come first and have neither norm
nor activity, take part with zeros.

Shape legend: T tokens, I = d in_features, O = k out_features, N experts, S shared, R = N − S
routed, r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DENSE = 256
"""Up to so many columns one product with a block-diagonal matrix beats one for each block."""
CHUNK = 4
"""Linears whose activity is computed together: few calls, and little memory at a time."""


class Directions(NamedTuple):
    """What the experts' parameters come to."""

    b: Tensor
    """B̃ = [s·B_shared, diag(v/d̃_i) B_i] (O, N·r), such that Δy = B̃ A x; stored by columns."""
    norm: Tensor
    """d̃ (N, O); for shared experts it means nothing."""
    gram: Tensor
    """M (N, r, r), zeros for shared experts; empty if not asked for."""


class ExpertOptions(NamedTuple):
    """What makes directions of the experts' parameters."""

    num_experts: int
    num_shared: int
    scale: float
    """s, of the shared experts."""
    eps: float
    detach_norm: bool = False


def directions(
    a: Tensor, bt: Tensor, v: Tensor | None, options: ExpertOptions, with_gram: bool = False
) -> Directions:
    """Return B̃, d̃ and M with their gradients to A, B and v, in the dtype of the parameters.

    Shape: A (N·r, I), Bᵀ (N·r, O), v (O,) or (R, O); None without routed experts.
    """
    if v is None:
        norm = bt.new_empty(options.num_experts, bt.shape[1])
        return Directions((bt * options.scale).t(), norm, bt.new_empty(0))
    made = _Directions.apply(a, bt, v, *options, with_gram)  # type: ignore[no-untyped-call]
    return Directions(*made)


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


def direction_gram(bt: Tensor, norm: Tensor, num_shared: int) -> Tensor:
    """Return M. Shape: Bᵀ (N·r, O), d̃ (N, O) → (N, r, r)."""
    return _direction_gram(_experts(bt, len(norm)), _inverse(norm, num_shared))


class _Directions(torch.autograd.Function):
    """B̃, d̃ and M; finite with a finite gradient at an all-zero row."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        bt: Tensor,
        v: Tensor,
        num_experts: int,
        num_shared: int,
        scale: float,
        eps: float,
        detach_norm: bool,
        with_gram: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Factor the Gram matrices of A in float64, and sum squares.

        The factor keeps the digits that rowsum((B_i G_i)∘B_i) cancels when A_i is nearly of rank 1.
        """
        wide = _experts(a, num_experts).to(torch.float64)
        gram = wide @ wide.mT
        b = _experts(bt, num_experts)
        turned = _factor_(gram, a.shape[1]).to(a.dtype).mT @ b
        gram_a = gram.to(a.dtype)
        norm = turned.square_().sum(1).add_(eps**2).sqrt_()
        inverse = _inverse(norm, num_shared)
        weight = torch.full_like(norm, scale)
        torch.mul(v, inverse[num_shared:], out=weight[num_shared:])
        made = _direction_gram(b, inverse) if with_gram else bt.new_empty(0)
        ctx.save_for_backward(a, bt, v, gram_a, inverse, weight)
        ctx.num_shared, ctx.detach_norm = num_shared, detach_norm
        ctx.set_materialize_grads(False)
        return (b * weight[:, None]).view_as(bt).t(), norm, made

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_b: Tensor | None, grad_norm: Tensor | None, grad_gram: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Go back through B̃ = w B, M = Bᵀ d̃^-2 B, and d̃ where both have been gathered.

        With X the gradient of B for a fixed d̃, that of d̃ is −rowsum(X∘B)/d̃ (B̃ and M are functions
        of B/d̃). Then ∂d̃/∂B = B G/d̃ and ∂d̃/∂A = Bᵀ diag(1/d̃) B A.
        """
        a, bt, v, gram_a, inverse, weight = ctx.saved_tensors
        num_experts = len(inverse)
        b = _experts(bt, num_experts)
        grad_v = None
        if grad_b is None:
            total, along = torch.zeros_like(b), torch.zeros_like(inverse)
        else:
            grad_b = _experts(grad_b.t().contiguous(), num_experts)
            total = grad_b * weight[:, None]
            along = (grad_b * b).sum(1)
            grad_v = (along * inverse)[ctx.num_shared :].sum_to_size(v.shape)
            along *= weight
        if grad_gram is not None:
            weighted = b * inverse.square()[:, None]
            total.baddbmm_(grad_gram + grad_gram.mT, weighted)
            along = (total * b).sum(1)
        if ctx.detach_norm:
            return None, total.view_as(bt), grad_v, *[None] * 6
        slope = along.mul_(inverse).neg_()
        if grad_norm is not None:
            slope += grad_norm
        slope *= inverse
        sloped = b * slope[:, None]
        total.baddbmm_(gram_a, sloped)
        grad_a = (sloped @ b.mT) @ _experts(a, num_experts)
        return grad_a.view_as(a), total.view_as(bt), grad_v, *[None] * 6


def _experts(rows: Tensor, num_experts: int) -> Tensor:
    """View (N·r, …) as (N, r, …)."""
    return rows.view(num_experts, -1, rows.shape[1])


def _inverse(norm: Tensor, num_shared: int) -> Tensor:
    """Return 1/d̃, and 0 for shared experts."""
    return torch.cat([torch.zeros_like(norm[:num_shared]), norm[num_shared:].reciprocal()])


def _direction_gram(b: Tensor, inverse: Tensor) -> Tensor:
    direction = b * inverse[:, None]
    return direction @ direction.mT


def _factor_(gram: Tensor, in_features: int) -> Tensor:
    """Return L with L Lᵀ = G, jittered in place relative to each row: small rows keep digits."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal.mul_(1 + 4 * in_features * torch.finfo(gram.dtype).eps)
    diagonal.add_(torch.finfo(gram.dtype).tiny)
    factor: Tensor = torch.linalg.cholesky_ex(gram)[0]
    return factor


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
