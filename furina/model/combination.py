"""One LoRA out of several adapters of a backbone: ΔW = Σ_i λ_i ΔW_i in each linear.

"linear" takes the weights as they are, λ_i = w_i, so the sum is exact.

"from" is our reading of FroM (Li et al. 2025, arXiv 2506.02478), which replaces the data in
RegMean's objective by Frobenius norms of the parameters and adds one hyperparameter. Of the paper
only the abstract was at hand, not its formula. RegMean minimises Σ_i ‖X_i (ΔW − ΔW_i)ᵀ‖_F², with
X_i the inputs of task i. An update's rows lie in the span of the inputs that it was trained on, so
ΔW_iᵀΔW_i stands in for X_iᵀX_i, and of it we keep the size, its trace ‖ΔW_i‖_F². With p in place
of 2, the hyperparameter, and with g_i = w_i ‖ΔW_i‖_F^p,

    Σ_i g_i ‖ΔW − ΔW_i‖_F²  is least at  ΔW = Σ_i g_i ΔW_i / Σ_i g_i

in each linear by itself. λ_i = Σ_j w_j · g_i / Σ_j g_j: the weights also say how large the whole
is, and p = 0 is "linear". An adapter that leaves a linear alone has ΔW_i = 0 there, which for p > 0
has no say in the mean.

Shape legend: I = d in_features, O = k out_features, R_i rank of ΔW_i.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from furina.adapters import AdapterLinear
from furina.adapters.lora import LoRAConfig
from furina.errors import ConfigurationError, NotMergeableError, nearest
from furina.model.state import AdaptedState

Combination = Literal["linear", "from"]
Factors = tuple[Tensor, Tensor]
"""B (O, R) and A (R, I) with ΔW = B A."""


def combined_factors(
    adapters: Mapping[str, AdaptedState],
    weights: Mapping[str, float],
    method: Combination = "linear",
    power: float = 2.0,
) -> dict[str, Factors]:
    """Return B = [λ_1 B_1, λ_2 B_2, …] and A = [A_1; A_2; …] of each linear that any adapts.

    Multiplied out in float64 and rounded once to the adapters' own dtype, fp32 or wider.

    Raises ConfigurationError for a method, weight or power that cannot be, and where an entry is
    not finite; NotMergeableError naming the adapter whose update is not one product of factors.
    """
    _check(weights, method, power)
    for name in weights:
        _require_mergeable(name, adapters[name])
    linears = dict.fromkeys(linear for name in weights for linear in adapters[name].layers)
    return {
        linear: _combined(linear, adapters, weights, 0.0 if method == "linear" else power)
        for linear in linears
    }


def coefficients(norms: Sequence[float], weights: Sequence[float], power: float) -> list[float]:
    """Return λ_i from ‖ΔW_i‖_F and w_i: the w_i themselves for power 0, and for updates of zero."""
    largest = max(norms)
    if power == 0 or largest == 0:
        return list(weights)
    shares = [w * (norm / largest) ** power for w, norm in zip(weights, norms, strict=True)]
    scale = math.fsum(weights) / math.fsum(shares)
    return [scale * share for share in shares]


def frobenius_norm(b: Tensor, a: Tensor) -> float:
    """Return ‖B A‖_F = ‖B Lᵀ‖_F with Aᵀ = Q L, Q orthonormal: no (O, I) product is formed.

    Unlike tr(BᵀB AAᵀ) it keeps its digits where the products of a factor cancel.
    """
    upper = torch.linalg.qr(a.T, mode="r").R
    norm: Tensor = torch.linalg.matrix_norm(b @ upper.T)
    return norm.item()


def lora_of(factors: Mapping[str, Factors]) -> tuple[LoRAConfig, dict[str, Tensor]]:
    """Return a LoRA of scale 1 and its tensors by name: the factors, padded to the largest rank."""
    rank = max(a.shape[0] for _, a in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in factors.items():
        missing = rank - a.shape[0]
        tensors[f"{name}.lora_A"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
        tensors[f"{name}.lora_B"] = torch.nn.functional.pad(b, (0, missing))
    return LoRAConfig(dropout=0.0, rank=rank, alpha=rank), tensors


@torch.no_grad()
def _combined(
    linear: str,
    adapters: Mapping[str, AdaptedState],
    weights: Mapping[str, float],
    power: float,
) -> Factors:
    """Combine the updates of one linear; an adapter that leaves it alone has the norm 0."""
    owners = [name for name in weights if linear in adapters[name].layers]
    layers = [adapters[name].layers[linear] for name in owners]
    parts = [_factors(name, layer) for name, layer in zip(owners, layers, strict=True)]
    norms = dict.fromkeys(weights, 0.0)
    if power:
        norms |= {name: frobenius_norm(*part) for name, part in zip(owners, parts, strict=True)}
    found = coefficients(list(norms.values()), list(weights.values()), power)
    scale = dict(zip(weights, found, strict=True))
    b = torch.cat([scale[name] * b for name, (b, _) in zip(owners, parts, strict=True)], dim=1)
    a = torch.cat([a for _, a in parts], dim=0)
    dtype = layers[0].parameter_dtype
    b, a = b.to(dtype), a.to(dtype)
    if not (b.isfinite().all() and a.isfinite().all()):
        raise ConfigurationError(
            f"The combined update of {linear} has NaN or infinite entries: an adapter diverged or "
            "a weight is too large."
        )
    return b, a


def _factors(name: str, layer: AdapterLinear) -> Factors:
    factors = layer.factors()
    if factors is None:
        raise NotMergeableError(
            f"Adapter {name!r} cannot be combined: its update is not low-rank, so no LoRA holds it."
        )
    device = layer.base.weight.device
    b, a = (factor.to(device) for factor in factors)
    return b, a


def _require_mergeable(name: str, state: AdaptedState) -> None:
    mergeable = state.config.mergeability()
    if not mergeable.ok:
        raise NotMergeableError(
            f"Adapter {name!r} cannot be combined: {state.config.name} has no fixed update, since "
            f"{mergeable.reason}."
        )


def _check(weights: Mapping[str, float], method: str, power: float) -> None:
    if method not in get_args(Combination):
        known = nearest(method, get_args(Combination))
        raise ConfigurationError(f"There is no way of combining called {method!r}.{known}")
    if not weights:
        raise ConfigurationError("There is nothing to combine: give each adapter's weight.")
    for name, weight in weights.items():
        if not (_is_number(weight) and weight != 0):
            raise ConfigurationError(
                f"The weight of adapter {name!r} is {weight!r}: give a finite number other than 0, "
                "or leave the adapter out."
            )
        if method == "from" and weight < 0:
            raise ConfigurationError(
                f"The weight of adapter {name!r} is {weight!r}, but 'from' takes a mean: give "
                "positive weights."
            )
    if not (_is_number(power) and power >= 0):
        raise ConfigurationError(f"power={power!r} must be a number, 0 or larger.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
