"""FURINA's equations, written for reading; the fast layer is tested against them.

A layer can train on them as they stand: `furina fit --method furina_plain`, or
`furina.adapt(model, "furina_plain")`, takes the options of `furina`, draws the same adapter and
leaves the gradients to autograd. To try another equation, change it here and train that method;
write the fast form (`furina/adapters/furina.py`, `furina/kernels/directions.py`) once it is worth
it, and `tests/adapters/test_furina.py` holds the two together.

Notation of the paper (arXiv 2509.14900): in = d, out = k, token x (d,); expert i has A_i (r, d) and
B_i (k, r). Of N experts S are shared and come first, R = N − S route themselves. Every function
forms the k×d products that the fast layer never forms.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_norm(weight: Tensor, eps: float) -> Tensor:
    """Return d̃ = sqrt(Σ_j W_·j² + ε²), one norm per output unit. Shape: (..., k, d) → (..., k)."""
    return (weight.square().sum(-1) + eps**2).sqrt()


def direction(a: Tensor, b: Tensor, eps: float, detach_norm: bool = False) -> Tensor:
    """Return Ŵ_i = diag(d̃_i)^-1 B_i A_i. Shape: (..., r, d), (..., k, r) → (..., k, d)."""
    weight = b @ a
    norm = row_norm(weight, eps)
    return weight / (norm.detach() if detach_norm else norm)[..., None]


def routed_update(x: Tensor, directions: Tensor, magnitude: Tensor) -> Tensor:
    """Return Σ_i diag(v) Ŵ_i x; v is (k,) when shared, (R, k) when each expert has its own.

    Shape: (..., d), (R, k, d), (k,) or (R, k) → (..., k).
    """
    a = torch.einsum("rkd,...d->...rk", directions, x)
    return (magnitude * a).sum(-2)


def shared_update(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return Σ_j s·B_j A_j x over the shared experts. Shape: (S, r, d), (S, k, r) → (..., k)."""
    return scale * torch.einsum("skr,srd,...d->...k", b, a, x)


def update(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    *,
    num_shared: int,
    scale: float,
    eps: float,
    detach_norm: bool = False,
) -> Tensor:
    """Return what all experts add to W x.

    Shape: (..., d), (N, r, d), (N, k, r), (k,) or (R, k) → (..., k).
    """
    directions = direction(a[num_shared:], b[num_shared:], eps, detach_norm)
    shared = shared_update(x, a[:num_shared], b[:num_shared], scale)
    return shared + routed_update(x, directions, magnitude)


def activity(x: Tensor, directions: Tensor, kind: str, eps: float) -> Tensor:
    """Return n_ti, how loudly expert i speaks for token t, from a_i = Ŵ_i x (before v).

    kind "l2": sqrt(|a_i|² + ε²); "l1": Σ_j |a_ij| + ε; "per_unit": |a_ij| + ε, unreduced.
    Shape: (T, d), (R, k, d) → (T, 1, R), or (T, k, R) for "per_unit".
    """
    a = torch.einsum("rkd,td->tkr", directions, x)
    if kind == "per_unit":
        return a.abs() + eps
    if kind == "l1":
        return a.abs().sum(1, keepdim=True) + eps
    return (a.square().sum(1, keepdim=True) + eps**2).sqrt()


def selection_loss(activity: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return (L_div, L_bal) of one linear from the activities of its real tokens.

    p_ti = n_ti / Σ_j n_tj; L_div = 1 − mean_t Σ_{top K} p_ti; F_i = share of the T·K selections
    that fell on i (no gradient); P_i = mean_t p_ti; L_bal = R Σ_i F_i P_i, which is 1 at balance.
    Shape: (T, U, R) → two scalars; the U output units of "per_unit" count as tokens.
    """
    share = (activity / activity.sum(-1, keepdim=True)).flatten(0, 1)
    top = share.topk(top_k, dim=-1)
    divergence = 1 - top.values.sum(-1).mean()
    chosen = torch.zeros_like(share).scatter(1, top.indices, 1.0)
    frequency = chosen.mean(0) / top_k
    balance = share.shape[1] * (frequency * share.mean(0)).sum()
    return divergence, balance
