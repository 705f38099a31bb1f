"""LoRAMoE: soft routing with a localized balancing constraint (Dou et al. 2023, arXiv 2312.09979).

    y = W x + b + s Σ_i softmax(R x)_i B_i A_i x

Half of the experts are labelled for each of two types of task. With p summed over the tokens of
sequence b, Z_bi = (1 ± δ) Σ_t p_ti, where + holds if expert i's half bears the sequence's type, the
loss of a linear is the squared coefficient of variation of all Z, and 0 where all Z are equal:

    L = β Σ_linears Var(Z)/Mean(Z)²        (the form of the released code)

Its minimum has the labelled half at the share (1 − δ)/(1 + δ) of the other: the label tells the
halves apart, and which of them answers to it is a convention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from furina.adapters.base import register
from furina.adapters.routing import DenseConfig, RoutedLinear
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker, Record


@register("loramoe")
@dataclass(frozen=True)
class LoRAMoEConfig(DenseConfig):
    """Options of LoRAMoE."""

    summary: ClassVar[str] = "soft routing with a balance between two halves of the experts"
    source: ClassVar[str] = "Dou et al. 2023, arXiv 2312.09979"
    parameter_formula: ClassVar[str] = "N·r(d+k)+N·d"
    deviations: ClassVar[str] = (
        "The constraint is off by default as in the released script; the paper's δ and β were not "
        "verified. Var/Mean² as in the code, where the paper writes Var/Mean. Padding does not "
        "count, there it does. One dropout mask for all experts, there one each. Router logits "
        "are fp32. It adapts the FFN only, with r 4, α 32 and N 8."
    )

    balance_coefficient: float = 0.0
    """Weight β of the localized balancing constraint; 0 turns it off."""
    balance_delta: float = 0.1
    """Imbalance δ between the halves, in [0, 1)."""
    task_type: Literal[0, 1] | None = None
    """Type of every sequence where the model is not called with `task_types` (batch,)."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.balance_coefficient >= 0, "balance_coefficient", "0 or larger")
        self.require(0 <= self.balance_delta < 1, "balance_delta", "in [0, 1)")
        self.require(
            not self.has_auxiliary_loss or self.num_experts % 2 == 0,
            "num_experts",
            "even, for two halves, while balance_coefficient > 0",
        )
        self.require(
            not (self.balance_coefficient and self.router_removed),
            "balance_coefficient",
            "0 without a router, which it would balance",
        )

    def without_router(self) -> Self:
        """Return the options of the control, which has nothing to balance."""
        return replace(self, router_removed=True, balance_coefficient=0.0)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the constraint is on."""
        return self.balance_coefficient > 0

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> LoRAMoELinear:
        """Wrap one linear."""
        return LoRAMoELinear(base, name, tracker, self)

    def statistics(
        self, records: Mapping[str, Record], mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Return each linear's [Σ Z, Σ Z², number of Z] over the sequences with a real token.

        In float64, in which near-equal Z can be subtracted. Records: p (B, T, N), types (B,).
        """
        return {name: self._sums(p, types, mask) for name, (p, types) in records.items()}

    def _sums(self, p: Tensor, types: Tensor, mask: Tensor | None) -> Tensor:
        real = p.new_ones(p.shape[:2], dtype=torch.bool) if mask is None else mask.view(p.shape[:2])
        half = torch.arange(self.num_experts, device=p.device) < self.num_experts // 2
        matching = types.view(-1, 1).to(torch.bool) == half
        labels = 1 + self.balance_delta * torch.where(matching, 1.0, -1.0).to(torch.float64)
        z = p.masked_fill(~real[..., None], 0.0).to(torch.float64).sum(1) * labels
        count = real.any(1).sum() * self.num_experts
        return torch.stack([z.sum(), z.square().sum(), count.to(z.dtype)])

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return β Σ Var(Z)/Mean(Z)² from each linear's [Σ Z, Σ Z², number of Z]."""
        total, square, count = torch.stack(list(statistics.values())).unbind(1)
        mean = total / count
        variance = (square - count * mean.square()) / (count - 1)
        return self.balance_coefficient * (variance / (mean.square() + 1e-10)).sum()


class LoRAMoELinear(RoutedLinear):
    """A softly routed linear that records how its halves share the sequences."""

    config: LoRAMoEConfig

    def selection(self, p: Tensor, g: Tensor) -> Record:
        """Return p (B, T, N) and the sequences' types (B,).

        Raises ConfigurationError without sequences or task types.
        """
        if p.dim() != 3:
            raise ConfigurationError(
                f"{self.name}: LoRAMoE balances sequences, so its input must be (batch, sequence, "
                f"features), not of {p.dim()} dimensions."
            )
        if self.tracker.active is None:  # a checkpoint function runs the layer again
            return (p,)
        types = self.tracker.active.task_types
        if types is None:
            if self.config.task_type is None:
                raise ConfigurationError(
                    "LoRAMoE's balancing constraint needs the type of every sequence: call the "
                    "model with task_types (batch,) of 0 and 1, or set the option task_type."
                )
            types = torch.full((p.shape[0],), self.config.task_type, device=p.device)
        return p, types
