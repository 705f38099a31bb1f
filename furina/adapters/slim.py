"""SLIM: soft LoRA and identity mixture (Han et al. 2024, arXiv 2410.07739).

    y = W x + b + s Σ_{i in top K} (1 − ρ(x)) w_i B_i A_i x,   w = softmax(R x) on the top K

Some of the experts are identities: they leave the layer as it is, so their update is zero, and the
weight that a token gives them goes to the backbone. An input that is far from what training saw
yields weight to them: with the nearest of C random centres c and the running mean μ and deviation
σ of the inputs nearest to it,

    ρ(x) = u/(1 + u),   u = max(0, max_channels |x − μ_c|/σ_c − τ)

No code was released. Of the paper we could verify the identity experts, top-K routing and that far
inputs yield weight to the identities; the form of ρ, the threshold τ, the momentum, and clustering
per token (the paper: per sample, which a decoder with a cache cannot know) are our readings. Its
L1 penalty and random masking of A and B ("dynamic merging") are not part of this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from furina.adapters.base import drawn_on, register
from furina.adapters.routing import RoutedLinear, TopKConfig
from furina.kernels.forward import ForwardTracker
from furina.kernels.product import no_autocast


@register("slim")
@dataclass(frozen=True)
class SLIMConfig(TopKConfig):
    """Options of SLIM."""

    summary: ClassVar[str] = "top-K routing between LoRA experts and identities"
    source: ClassVar[str] = "Han et al. 2024, arXiv 2410.07739 (no code released)"
    parameter_formula: ClassVar[str] = "N·r(d+k)+(N+2)·d; 2 identity experts"
    deviations: ClassVar[str] = (
        "No code to compare with. Identity experts add nothing, which any linear allows. Not "
        "verified: how weight is yielded, its threshold and momentum; clusters are per token. "
        "The L1 penalty and the masked merging are left out."
    )

    num_experts: int = 8
    """Number N of LoRA experts."""
    num_identity_experts: int = 2
    """Number of identity experts beside them."""
    weight_yielding: bool = True
    """Let inputs far from the training data yield weight to the identities."""
    num_clusters: int = 8
    """Number C of clusters that describe the training data."""
    yield_threshold: float = 4.0
    """Deviations τ from its cluster's mean that an input may have without yielding."""
    cluster_momentum: float = 0.9
    """Share of the old mean and deviation in a cluster's update after each optimiser step."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.num_experts > 0, "num_experts", "at least 1")
        self.require(self.num_identity_experts >= 0, "num_identity_experts", "0 or larger")
        self.require(self.num_clusters > 0, "num_clusters", "at least 1")
        self.require(self.yield_threshold >= 0, "yield_threshold", "0 or larger")
        self.require(0 <= self.cluster_momentum < 1, "cluster_momentum", "in [0, 1)")

    @property
    def most_experts(self) -> int:
        """All experts, identities included."""
        return self.num_experts + self.num_identity_experts

    def num_experts_of(self, name: str) -> int:
        """Return the number of LoRA experts."""
        return self.num_experts

    def router_rows(self, name: str) -> int:
        """Return one row for each LoRA expert and each identity."""
        return self.most_experts

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> SLIMLinear:
        """Wrap one linear."""
        return SLIMLinear(base, name, tracker, self)


class SLIMLinear(RoutedLinear):
    """A linear with N LoRA experts, a router that knows the identities too, and C clusters.

    `centres` (C, I) are fixed; `mean` and `deviation` (C, I) follow the training inputs, and `seen`
    (C,) is 1 once a cluster had any.
    """

    config: SLIMConfig
    centres: Tensor
    mean: Tensor
    deviation: Tensor
    seen: Tensor

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: SLIMConfig
    ) -> None:
        """Draw experts and router as in `RoutedLinear`, and the centres from N(0, 1)."""
        super().__init__(base, name, tracker, config)
        if self.has_router and config.weight_yielding:
            tracker.sum_over_step(name)
            shape = config.num_clusters, base.in_features
            drawn = drawn_on(base.weight)
            centres = torch.randn(shape, dtype=self.parameter_dtype, device=drawn)
            self.register_buffer("centres", centres.to(self.lora_A))
            self.register_buffer("mean", self.lora_A.new_zeros(shape))
            self.register_buffer("deviation", self.lora_A.new_ones(shape))
            self.register_buffer("seen", self.lora_A.new_zeros(shape[0]))

    def gates(self, x: Tensor) -> Tensor:
        """Return s·(1 − ρ)·w of the LoRA experts. Shape: (..., I) → (..., N)."""
        gates = super().gates(x)[..., : self.num_experts]
        if not (self.has_router and self.config.weight_yielding):
            return gates
        if self.training and self.tracker.active is not None:
            self._note(x)
        return gates * (1 - self.yielded(x))[..., None]

    @torch.no_grad()
    def yielded(self, x: Tensor) -> Tensor:
        """Return ρ, which has no gradient. Shape: (..., I) → (...)."""
        x, nearest = x.to(self.mean.dtype), self._nearest(x)
        distance = ((x - self.mean[nearest]).abs() / self.deviation[nearest]).amax(-1)
        excess = (distance - self.config.yield_threshold).clamp(min=0) * self.seen[nearest]
        return excess / (1 + excess)

    def _nearest(self, x: Tensor) -> Tensor:
        """Return the index of the centre next to each token. Shape: (..., I) → (...)."""
        with no_autocast(x.device):
            x = x.to(self.centres.dtype)
            return (x @ self.centres.T - self.centres.square().sum(1) / 2).argmax(-1)

    @torch.no_grad()
    def _note(self, x: Tensor) -> None:
        """Add [number, Σ x, Σ x²] of each cluster's real tokens to those of this step."""
        mask = self.real_tokens(x)
        flat = x.to(self.mean.dtype).flatten(0, -2)
        members = nn.functional.one_hot(self._nearest(flat), self.config.num_clusters)
        members = members.to(flat.dtype)
        members = members if mask is None else members.masked_fill(~mask, 0.0)
        parts = members.sum(0)[:, None], members.T @ flat, members.T @ flat.square()
        self.tracker.record(self.name, torch.cat(parts, dim=1))

    def step_statistics(self) -> Tensor | None:
        """Return the clusters' sums since the last optimiser step. Shape: (C, 1 + 2I)."""
        follows = self.has_router and self.config.weight_yielding
        return self.tracker.take(self.name) if follows else None

    def after_step(self, statistics: Tensor) -> None:
        """Move mean and deviation of the clusters that had inputs."""
        d = self.base.in_features
        number, total, square = torch.split(statistics.to(torch.float64), [1, d, d], dim=1)
        had = number > 0
        mean = total / number.clamp(min=1)
        variance = (square / number.clamp(min=1) - mean.square()).clamp(min=0)
        keep = self.config.cluster_momentum * self.seen.to(torch.float64)[:, None]
        floor = 1e-3  # of a cluster with one input, or a channel that never moves
        for buffer, new in ((self.mean, mean), (self.deviation, variance.sqrt().clamp(min=floor))):
            moved = keep * buffer.to(torch.float64) + (1 - keep) * new
            buffer.copy_(torch.where(had, moved, buffer.to(torch.float64)))
        self.seen.copy_(torch.maximum(self.seen, had[:, 0].to(self.seen.dtype)))
