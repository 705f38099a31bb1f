"""HydraLoRA: one shared A, N heads B, a soft router (Tian et al. 2024, arXiv 2404.19245).

    y = W x + b + s Σ_i softmax(R x)_i B_i (A x)

A x is computed once, and B [g ⊗ (A x)] in one matmul with the heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from furina.adapters.base import ParameterCount, register
from furina.adapters.routing import DenseConfig, RoutedLinear
from furina.kernels.forward import ForwardTracker


@register("hydralora")
@dataclass(frozen=True)
class HydraLoRAConfig(DenseConfig):
    """Options of HydraLoRA."""

    summary: ClassVar[str] = "one A, N heads B weighed by a softmax router per linear"
    source: ClassVar[str] = "Tian et al. 2024, arXiv 2404.19245"
    parameter_formula: ClassVar[str] = "r·d+N·r·k+N·d"
    deviations: ClassVar[str] = (
        "One dropout mask for all heads: the released code draws one per head and so applies A N "
        "times. Router logits are fp32, there in the model's dtype. It adapts the FFN only, with "
        "r 4, α 32 and N 4; its published parameter counts leave the router out."
    )

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> HydraLoRALinear:
        """Wrap one linear."""
        return HydraLoRALinear(base, name, tracker, self)

    def count(self, in_features: int, out_features: int, name: str = "") -> ParameterCount:
        """Return r·d + N·r·k + N·d; all of it acts on every token."""
        n, r = self.num_experts, self.rank
        router = n * in_features if self.has_router(name) else 0
        trainable = r * in_features + n * r * out_features + router
        return ParameterCount(trainable, router, trainable)


class HydraLoRALinear(RoutedLinear):
    """A linear with one A (r, I), heads B (O, N·r) side by side, and a router."""

    @property
    def rows_of_a(self) -> int:
        """The rank: the heads share A."""
        return self.config.rank
