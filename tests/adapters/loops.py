"""The baselines' equations as loops over tokens and experts, written from the papers.

Nothing here is shared with `furina.adapters`: each function takes plain tensors, forms every
expert's product by itself and picks experts by sorting. Shapes: x (T, d), W (k, d), A_e (r, d),
B_e (k, r).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Expert = tuple[Tensor, Tensor]
"""(A_e, B_e)."""


def softmax(logits: Tensor) -> Tensor:
    e = torch.exp(logits - logits.max())
    return e / e.sum()


def largest(scores: Tensor, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i].item())[:k]


def all_experts(p: Tensor) -> dict[int, Tensor]:
    return dict(enumerate(p))


def best_experts(k: int) -> Callable[[Tensor], dict[int, Tensor]]:
    """Select the k most probable experts, with weights rescaled to sum to 1."""

    def select(p: Tensor) -> dict[int, Tensor]:
        chosen = largest(p, k)
        total = sum(p[e] for e in chosen)
        return {e: p[e] / total for e in chosen}

    return select


def mixture(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    experts: Sequence[Expert],
    router: Tensor,
    scale: float,
    select: Callable[[Tensor], dict[int, Tensor]],
) -> Tensor:
    """y_t = W x_t + b + s Σ_e g_e(x_t) B_e A_e x_t."""
    rows = []
    for token in x:
        y = weight @ token if bias is None else weight @ token + bias
        for e, g in select(softmax(router @ token)).items():
            if e < len(experts):  # the others are identities, which add nothing
                a, b = experts[e]
                y = y + scale * g * (b @ (a @ token))
        rows.append(y)
    return torch.stack(rows)


def flylora(
    x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor, d: Tensor, k: int, scale: float
) -> Tensor:
    """y_t = W x_t + b + s Σ_{i in S} B_·i (A_i x_t), S the k largest |A_i x_t + d_i|."""
    rows = []
    for token in x:
        activations = a @ token
        y = weight @ token + bias
        for i in largest((activations + d).abs(), k):
            y = y + scale * b[:, i] * activations[i]
        rows.append(y)
    return torch.stack(rows)


def mixed_ffn(
    x: Tensor,
    weights: dict[str, Tensor],
    experts: dict[str, Sequence[Expert]],
    router: Tensor,
    scale: float,
    k: int,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """FFN(x_t) = Σ_{e in top k} w_e W₂ₑ [act(W₁ₑ x_t) ⊙ W₃ₑ x_t]."""

    def of(name: str, e: int) -> Tensor:
        a, b = experts[name][e]
        return weights[name] + scale * b @ a

    rows = []
    for token in x:
        y = torch.zeros(weights["down_proj"].shape[0], dtype=x.dtype)
        for e, w in best_experts(k)(softmax(router @ token)).items():
            hidden = act(of("gate_proj", e) @ token) * (of("up_proj", e) @ token)
            y = y + w * (of("down_proj", e) @ hidden)
        rows.append(y)
    return torch.stack(rows)


def load_balance(probabilities: Sequence[Tensor], k: int, slots: int) -> Tensor:
    """N Σ_e f_e P_e over all given tokens, f_e = selections of e over `slots` per token."""
    n, count = len(probabilities[0]), len(probabilities)
    loss = torch.zeros((), dtype=probabilities[0].dtype)
    for e in range(n):
        f = sum(e in largest(p, k) for p in probabilities) / (slots * count)
        loss = loss + n * f * sum(p[e] for p in probabilities) / count
    return loss


def localized_balance(
    sequences: Sequence[Sequence[Tensor]], types: Sequence[int], delta: float
) -> Tensor:
    """Var(Z)/Mean(Z)² with Z_bi = (1 ± δ) Σ_t p_ti; the first half of the experts is type 1."""
    z = []
    for tokens, kind in zip(sequences, types, strict=True):
        n = len(tokens[0])
        for i in range(n):
            own = 1 if i < n // 2 else 0
            label = 1 + delta if own == kind else 1 - delta
            z.append(label * sum(p[i] for p in tokens))
    mean = sum(z) / len(z)
    return sum((value - mean) ** 2 for value in z) / (len(z) - 1) / mean**2
