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
from furina.context import ForwardTracker, Record
from furina.errors import ConfigurationError


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
        """Return each linear's sums over the sequences, which it recorded as such."""
        return {name: sums for name, (sums,) in records.items()}

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return β Σ Var(Z)/Mean(Z)² from each linear's [Σ Z, Σ Z², number of Z]."""
        total, square, count = torch.stack(list(statistics.values())).unbind(1)
        mean = total / count
        variance = (square - count * mean.square()) / (count - 1)
        return self.balance_coefficient * (variance / (mean.square() + 1e-10)).sum()


class LoRAMoELinear(RoutedLinear):
    """A softly routed linear that records how its halves share the sequences."""

    config: LoRAMoEConfig

    @property
    def records_statistics(self) -> bool:
        """Whether the constraint is on."""
        return self.config.has_auxiliary_loss

    def selection(self, x: Tensor, p: Tensor, g: Tensor) -> Record:
        """Return [Σ Z, Σ Z², number of Z] in float64, in which near-equal Z can be subtracted.

        Shape: p (B, T, N) → (3,). Raises ConfigurationError without sequences or task types.
        """
        if p.dim() != 3:
            raise ConfigurationError(
                f"{self.name}: LoRAMoE balances sequences, so its input must be (batch, sequence, "
                f"features), not of {p.dim()} dimensions."
            )
        assert self.tracker.active is not None
        mask = self.tracker.active.real_tokens(x, self.name)
        if mask is not None:
            p = p.masked_fill(~mask.view(*p.shape[:2], 1), 0.0)
        z = p.to(torch.float64).sum(1) * self._labels(p)
        return (torch.stack([z.sum(), z.square().sum(), z.new_tensor(float(z.numel()))]),)

    def _labels(self, p: Tensor) -> Tensor:
        """Return 1 + δ where the expert's half bears the sequence's type, else 1 − δ: (B, N)."""
        assert self.tracker.active is not None
        types = self.tracker.active.task_types
        if types is None:
            if self.config.task_type is None:
                raise ConfigurationError(
                    "LoRAMoE's balancing constraint needs the type of every sequence: call the "
                    "model with task_types (batch,) of 0 and 1, or set the option task_type."
                )
            types = torch.full((p.shape[0],), self.config.task_type, device=p.device)
        half = torch.arange(self.num_experts, device=p.device) < self.num_experts // 2
        matching = types.view(-1, 1).to(torch.bool) == half
        delta = self.config.balance_delta
        return 1 + delta * torch.where(matching, 1.0, -1.0).to(torch.float64)
