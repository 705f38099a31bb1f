"""What the factors of low-rank updates say about them, without forming an (O, I) product.

Shape legend: I = d in_features, O = k out_features, N experts, r rank of one expert, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cosines(b: Tensor, a: Tensor) -> Tensor:
    """Return ⟨W_i, W_j⟩ / (|W_i| |W_j|) of W_i = B_i A_i, Frobenius; NaN with a W_i of zero.

    ⟨W_i, W_j⟩ = tr(A_iᵀ B_iᵀ B_j A_j) = Σ (B_iᵀ B_j) ∘ (A_i A_jᵀ), from two products of all
    experts' factors. Shape: B (N, O, r), A (N, r, I) → (N, N).
    """
    n, r = a.shape[:2]
    columns, rows = b.movedim(0, 1).flatten(1), a.flatten(0, 1)
    gram_b, gram_a = ((m @ m.T).view(n, r, n, r) for m in (columns.T, rows))
    inner = (gram_b * gram_a).sum((1, 3))
    norm = inner.diagonal().clamp(min=0).sqrt()
    return inner / norm / norm[:, None]


def mean_similarity(b: Tensor, a: Tensor) -> float | None:
    """Return the mean |cosine| over pairs of experts; None if less than two are not zero.

    Experts without an update are left out. Shape: B (N, O, r), A (N, r, I).
    """
    found = cosines(b, a).abs()
    upper = found[tuple(torch.triu_indices(len(found), len(found), offset=1))]
    known = upper[~upper.isnan()]
    return known.mean().item() if len(known) else None


def effective_rank(b: Tensor, a: Tensor) -> float:
    """Return exp(H(σ/Σσ)) of the singular values σ of B A, 0 where B A = 0.

    With B = Q L and Aᵀ = P U (Q, P orthonormal), B A has the singular values of L Uᵀ (R, R).
    After Roy and Vetterli 2007, "The effective rank". Shape: B (O, R), A (R, I).
    """
    left, right = (torch.linalg.qr(m, mode="r").R for m in (b, a.T))
    sigma = torch.linalg.svdvals(left @ right.T)
    total = sigma.sum()
    if total == 0:
        return 0.0
    rank: float = torch.special.entr(sigma / total).sum().exp().item()
    return rank
