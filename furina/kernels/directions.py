"""FURINA's algebra of one linear: norms and directions without a k×d product.

    d̃_i² = rowsum((B_i L_i)²) + ε²,  A_i A_iᵀ = L_i L_iᵀ  (with a Cholesky factor for stability)
    M_i = B_iᵀ diag(d̃_i)^-2 B_i,  from which `furina/kernels/activity.py` gets |Ŵ_i x|

All experts are worked on at once. B comes as Bᵀ (N·r, O): then every step is one pass along
contiguous rows, or one batched product. The shared experts, which come first and have neither norm
nor activity, take part with zeros.

Shape legend: I = d in_features, O = k out_features, N experts, S shared, R = N − S
routed, r rank of one expert.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
