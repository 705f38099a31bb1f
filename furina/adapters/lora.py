"""LoRA: y = W x + s·B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from furina.adapters.base import (
    AdapterConfig,
    AdapterLinear,
    Mergeability,
    ParameterCount,
    kaiming_uniform,
    register,
    zeros,
)
from furina.kernels.forward import ForwardTracker, Operands
from furina.kernels.product import low_rank_product, update_dtype


def lora_scale(rank: int, alpha: float | None, use_rslora: bool) -> float:
    """Return s = α/r, or α/√r with rsLoRA; `alpha` defaults to 2r."""
    alpha = 2 * rank if alpha is None else alpha
    return alpha / (math.sqrt(rank) if use_rslora else rank)


@dataclass(frozen=True)
class LowRankConfig(AdapterConfig):
    """Options of every method made of low-rank updates of one scale."""

    rank: int = 16
    """Rank r of an update."""
    alpha: float | None = None
    """Numerator of the scale; 2r when not given."""
    use_rslora: bool = False
    """Scale by α/√r in place of α/r."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.rank > 0, "rank", "at least 1")
        self.require(self.alpha is None or self.alpha > 0, "alpha", "positive")

    @property
    def scale(self) -> float:
        """The factor s on B A, from the rank of one update."""
        return lora_scale(self.rank, self.alpha, self.use_rslora)


@register("lora")
@dataclass(frozen=True)
class LoRAConfig(LowRankConfig):
    """Options of LoRA."""

    summary: ClassVar[str] = "one low-rank update per linear"
    source: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    parameter_formula: ClassVar[str] = "r(d+k)"

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> AdapterLinear:
        """Wrap one linear."""
        return LoRALinear(base, name, tracker, self)

    def mergeability(self) -> Mergeability:
        """Say why LoRA merges."""
        return Mergeability(True, "the update s·B A does not depend on the input")

    def count(self, in_features: int, out_features: int, name: str = "") -> ParameterCount:
        """Return r(d+k)."""
        trainable = self.rank * (in_features + out_features)
        return ParameterCount(trainable, router=0, active=trainable)


class LoRALinear(AdapterLinear):
    """A linear with one low-rank update; starts at the base because B is zero."""

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: LoRAConfig
    ) -> None:
        """Draw A (r, I) as nn.Linear does and set B (O, r) to zero."""
        super().__init__(base, name, tracker)
        self.dropout, self.scale = config.dropout, config.scale
        self.lora_A = kaiming_uniform(config.rank, base.in_features, base.in_features, like=self)
        self.lora_B = zeros(base.out_features, config.rank, like=self)

    def forward(self, x: Tensor) -> Tensor:
        """Apply W x + b + s·B A dropout(x). Shape: (..., I) → (..., O)."""
        a, b, _ = self.operands(x, update_dtype(x))
        return low_rank_product(self.base, x, a, b, scale=self.scale, dropout=self.drop_rate).y

    def derive(self) -> Operands:
        """Return A and B."""
        return Operands(self.lora_A, self.lora_B)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (s·B, A) in float64."""
        b, a = self.lora_B.detach().to(torch.float64), self.lora_A.detach().to(torch.float64)
        return self.scale * b, a
