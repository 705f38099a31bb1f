"""MoLA: top-K routing with more experts in higher layers (Gao et al. 2024, arXiv 2402.08562).

    y = W x + b + s Σ_{e in top K} w_e B_e A_e x,   w = softmax(R x) on the top K, rescaled to 1

The load balancing loss of a layer pools its linears; with f_e the share of all selections that fell
on expert e and P_e its mean probability over real tokens and linears,

    L = α Σ_layers N_l Σ_e f_e P_e        (1 a layer at perfect balance; released code's reduction)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from furina.adapters.base import register
from furina.adapters.routing import TopKConfig, load_balancing


@register("mola")
@dataclass(frozen=True)
class MoLAConfig(TopKConfig):
    """Options of MoLA."""

    summary: ClassVar[str] = "top-K routing per linear, more experts in higher layers"
    source: ClassVar[str] = "Gao et al. 2024, arXiv 2402.08562"
    parameter_formula: ClassVar[str] = "N·r(d+k)+N·d; N of the layer"
    deviations: ClassVar[str] = (
        "The balancing loss is on, as its authors advise; the released script has it off. Padding "
        "does not count, there it does. Router logits are fp32, there in the model's dtype. "
        "One dropout mask for all experts, there one for those selected."
    )

    allocation: tuple[int, ...] = (2, 4, 6, 8)
    """Experts N_l from the lowest to the highest layers: each number serves an equal part."""
    num_layers: int | None = None
    """Number of layers that allocation is spread over; found in the model when not given."""
    balance_coefficient: float = 1e-3
    """Weight α of the load balancing loss; 0 turns it off."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        counts = bool(self.allocation) and all(n > 0 for n in self.allocation)
        self.require(counts, "allocation", "one or more numbers of at least 1")
        self.require(self.balance_coefficient >= 0, "balance_coefficient", "0 or larger")
        self.require(
            self.num_layers is None or self.num_layers % len(self.allocation) == 0,
            "allocation",
            f"one number, or as many as divide the {self.num_layers} layers into equal parts",
        )

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the load balancing loss is on."""
        return self.balance_coefficient > 0 and self.records_selection

    @property
    def most_experts(self) -> int:
        """The largest N_l."""
        return max(self.allocation)

    def resolve(self, names: Sequence[str]) -> MoLAConfig:
        """Count the model's layers."""
        if self.num_layers is not None:
            return self
        return replace(self, num_layers=1 + max(map(layer_index, names)))

    def num_experts_of(self, name: str) -> int:
        """Return N_l of the layer that the linear `name` is in."""
        if len(self.allocation) == 1:
            return self.allocation[0]
        self.require(self.num_layers is not None, "num_layers", "given, to spread allocation over")
        assert self.num_layers is not None
        index = layer_index(name)
        self.require(index < self.num_layers, "num_layers", f"above {index}, as {name} has it")
        return self.allocation[index * len(self.allocation) // self.num_layers]

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return α Σ_layers N_l Σ f P from each linear's `selection_sums`."""
        layers: dict[int, list[Tensor]] = {}
        for name, sums in statistics.items():
            layers.setdefault(layer_index(name), []).append(sums)
        losses = [
            load_balancing(
                torch.stack(sums).sum(0),
                tokens * len(sums),
                slots=min(self.top_k, sums[0].numel() // 2),
            )
            for sums in layers.values()
        ]
        return self.balance_coefficient * torch.stack(losses).sum()


def layer_index(name: str) -> int:
    """Return the number in a module name such as model.layers.7.mlp.up_proj; 0 if there is none."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else 0
