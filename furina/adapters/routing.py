"""What mixtures with a router share: low-rank experts side by side, weighed per token.

    y = W x + b + s Σ_e g_e(x) B_e A_e x

With A stacked to (N·r, I) and B to (O, N·r) this is B [(A x) ⊙ g], two matmuls whatever N, in which
each g_e multiplies the r rows of its expert; experts that a token does not select have g_e = 0.
Router logits and softmax are at least fp32, and the router sees its input without dropout.

Shape legend: T tokens, I = d in_features, O = k out_features, N experts, r rank of one expert,
K experts of a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.adapters.base import (
    AdapterLinear,
    Mergeability,
    ParameterCount,
    drawn_on,
    kaiming_uniform,
    zeros,
)
from furina.adapters.lora import LowRankConfig
from furina.adapters.mixture import MOST_ACTIVE, MixtureLinear
from furina.errors import NotMergeableError
from furina.kernels.forward import ForwardTracker, Operands, Record
from furina.kernels.product import low_rank_product, no_autocast, update_dtype


@dataclass(frozen=True)
class RoutedConfig(LowRankConfig):
    """Options of every mixture with a router."""

    router_start: ClassVar[Literal["kaiming", "normal"]] = "kaiming"
    """U(−1/√d, 1/√d) as nn.Linear draws it, or N(0, 0.02²)."""

    rank: int = 8
    """Rank r of each expert."""
    router_removed: bool = False
    """The paper's control: no router, every expert counts 1/N. Then the mixture merges."""

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> AdapterLinear:
        """Wrap one linear."""
        return RoutedLinear(base, name, tracker, self)

    def weigh(self, p: Tensor) -> Tensor:
        """Return the experts' weights from the router's probabilities. Shape: (..., N)."""
        return p

    def without_router(self) -> Self:
        """Return the options of the control (table 7): no router, and nothing on that needs one."""
        return replace(self, router_removed=True)

    @property
    @abstractmethod
    def most_experts(self) -> int:
        """The number of experts of the linear that has most of them."""

    def num_experts_of(self, name: str) -> int:
        """Return the number of experts of the linear called `name`."""
        return self.most_experts

    def statistics(
        self, records: Mapping[str, Record], mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Return each linear's `selection_sums`, of all that have as many experts together."""
        alike: dict[int, list[str]] = {}
        for name, (p, _) in records.items():
            alike.setdefault(p.shape[-1], []).append(name)
        found: dict[str, Tensor] = {}
        for names in alike.values():
            p, chosen = map(torch.stack, zip(*(records[name] for name in names), strict=True))
            found |= zip(names, selection_sums(p, chosen, mask).unbind(), strict=True)
        return {name: found[name] for name in records}

    def router_rows(self, name: str) -> int:
        """Return the rows of the router in the linear called `name`: one for each expert."""
        return self.num_experts_of(name)

    def has_router(self, name: str) -> bool:
        """Return whether the linear called `name` has a router: one expert needs none."""
        return not self.router_removed and self.router_rows(name) > 1

    def mergeability(self) -> Mergeability:
        """Merge where nothing depends on the input."""
        if self.router_removed:
            return Mergeability(True, "without a router the experts' average is one fixed update")
        if self.most_experts == 1:
            return Mergeability(True, "a single expert is an ordinary LoRA")
        return Mergeability(False, "the router weighs the experts anew for every token")

    def experts_of_a_token(self, name: str) -> int:
        """Return how many experts act on one token in the linear called `name`."""
        return self.num_experts_of(name)

    @property
    def most_active(self) -> int:
        """The number of experts that act on a token, or of those called its most active."""
        return MOST_ACTIVE

    def count(self, in_features: int, out_features: int, name: str = "") -> ParameterCount:
        """Return N·r(d+k), and where there is a router d for each of its rows."""
        router = self.router_rows(name) * in_features if self.has_router(name) else 0
        expert = self.rank * (in_features + out_features)
        trainable = self.num_experts_of(name) * expert + router
        return ParameterCount(trainable, router, self.experts_of_a_token(name) * expert + router)


class RoutedLinear(MixtureLinear):
    """A linear with N low-rank experts and, unless there is but one, a router."""

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: RoutedConfig
    ) -> None:
        """Draw A (N·r, I) and the router (N, I), and set B (O, N·r) to zero."""
        super().__init__(base, name, tracker)
        self.config, self.dropout = config, config.dropout
        self.num_experts = config.num_experts_of(name)
        d, k, rows = base.in_features, base.out_features, self.num_experts * config.rank
        self.lora_A = kaiming_uniform(self.rows_of_a, d, d, like=self)
        self.lora_B = zeros(k, rows, like=self)
        if config.has_router(name):
            self.router = router_parameter(self.router_rows, config.router_start, like=self)

    @property
    def rows_of_a(self) -> int:
        """Rows of A: those of all experts, unless they share one."""
        return self.num_experts * self.config.rank

    @property
    def router_rows(self) -> int:
        """Rows of the router."""
        return self.config.router_rows(self.name)

    @property
    def average_scale(self) -> float:
        """The factor s/N on each expert without a router."""
        return self.config.scale / self.router_rows

    @property
    def has_router(self) -> bool:
        """Whether the experts are weighed per token."""
        return hasattr(self, "router")

    def forward(self, x: Tensor) -> Tensor:
        """Apply W x + b + s·B [(A dropout(x)) ⊙ g(x)]. Shape: (..., I) → (..., O)."""
        a, b, _ = self.operands(x, update_dtype(x))
        return low_rank_product(self.base, x, a, b, gates=self.gates(x), dropout=self.drop_rate).y

    def derive(self) -> Operands:
        """Return A and B of all experts."""
        return Operands(self.lora_A, self.lora_B)

    def gates(self, x: Tensor) -> Tensor:
        """Return s·g, at least fp32. Shape: (..., I) → (..., N), or (N,) without a router."""
        if not self.has_router:
            return self.lora_B.new_full((self.num_experts,), self.average_scale)
        p = self.probabilities(x)
        g = self.config.weigh(p)
        self.record(x, lambda: self.selection(p, g))
        return self.config.scale * g

    def probabilities(self, x: Tensor) -> Tensor:
        """Return the router's softmax, at least fp32. Shape: (..., I) → (..., N)."""
        with no_autocast(x.device):
            logits = functional.linear(x.to(self.router.dtype), self.router)
        return logits.softmax(-1)

    def selection(self, p: Tensor, g: Tensor) -> Record:
        """Return what the method's loss needs: by default p and which g are not 0, (T, N) each."""
        return p.flatten(0, -2), g.detach().flatten(0, -2) != 0

    @property
    def refusal(self) -> str | None:
        """Why there is no choice: without a router."""
        return None if self.has_router else "it has no router"

    @property
    def most_active(self) -> int:
        """K of the config."""
        return self.config.most_active

    def activity(self, x: Tensor) -> Tensor:
        """Return the router's probabilities. Shape: (T, I) → (T, 1, router rows)."""
        return self.probabilities(x)[:, None]

    @torch.no_grad()
    def experts(self) -> tuple[Tensor, Tensor]:
        """Return (B, A), where A may be one for all. Shape: (N, O, r), (N, r, I)."""
        a, b = self.lora_A.to(torch.float64), self.lora_B.to(torch.float64)
        n, r = self.num_experts, self.config.rank
        return b.view(-1, n, r).transpose(0, 1), a.view(-1, r, a.shape[1]).expand(n, -1, -1)

    @property
    def records_statistics(self) -> bool:
        """Whether it has a router that its method balances."""
        return self.has_router and self.config.has_auxiliary_loss

    def auxiliary_slices(self) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
        """Return the router, if its method balances it."""
        return [(self.router, (slice(None),))] if self.records_statistics else []

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (B, A) of the average of the experts; refuse with the reason where g varies."""
        if self.has_router:
            raise NotMergeableError(f"{self.name}: {self.config.mergeability().reason}.")
        a, b = self.lora_A.to(torch.float64), self.lora_B.to(torch.float64)
        if self.rows_of_a == self.config.rank:
            b = b.reshape(b.shape[0], self.num_experts, -1).sum(1)
        return b * self.average_scale, a


@dataclass(frozen=True)
class DenseConfig(RoutedConfig):
    """Options of a mixture in which all experts act on every token."""

    num_experts: int = 8
    """Number N of experts."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.num_experts > 0, "num_experts", "at least 1")

    @property
    def most_experts(self) -> int:
        """The number of experts."""
        return self.num_experts


@dataclass(frozen=True)
class TopKConfig(RoutedConfig):
    """Options of a mixture in which a token selects K experts."""

    top_k: int = 2
    """Number K of experts that act on a token."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.top_k > 0, "top_k", "at least 1")

    def weigh(self, p: Tensor) -> Tensor:
        """Keep the K largest probabilities of each token, rescaled to sum to 1. Shape: (..., N)."""
        kept = p.topk(min(self.top_k, p.shape[-1]), dim=-1)
        weights = kept.values / kept.values.sum(-1, keepdim=True)
        return torch.zeros_like(p).scatter(-1, kept.indices, weights)

    @property
    def records_selection(self) -> bool:
        """Whether a router selects."""
        return not self.router_removed and self.most_experts > 1

    @property
    def most_active(self) -> int:
        """K."""
        return self.top_k

    def experts_of_a_token(self, name: str) -> int:
        """Return K, or all experts where there are not more, or nobody selects."""
        n = self.num_experts_of(name)
        return n if self.router_removed else min(self.top_k, n)


def router_parameter(
    rows: int, start: Literal["kaiming", "normal"], like: AdapterLinear
) -> nn.Parameter:
    """Return the weight of a router without bias. Shape: (rows, I)."""
    d = like.base.in_features
    router = kaiming_uniform(rows, d, d, like=like)
    if start == "normal":
        normal = torch.empty_like(router, device=drawn_on(router)).normal_(std=0.02)
        router = nn.Parameter(normal.to(router.device))
    return router


def selection_sums(p: Tensor, chosen: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sums over real tokens of [Σ_chosen p_t, p_t (N), 1[i is chosen] (N)].

    Shape: p and chosen (..., T, N), mask (T, 1) → (..., 1 + 2N).
    """
    chosen = chosen.to(p.dtype)
    if mask is not None:
        p, chosen = (each.masked_fill(~mask, 0.0) for each in (p, chosen))
    share = (p * chosen).sum((-2, -1))
    return torch.cat([share[..., None], p.sum(-2), chosen.sum(-2)], dim=-1)


def load_balancing(sums: Tensor, positions: Tensor, slots: int) -> Tensor:
    """Return N Σ_e f_e P_e with f_e = count_e/(slots·positions) and P_e = Σ p_e/positions.

    f has no gradient. At perfect balance it is K/slots: 1 with slots = K, where f is a share of the
    selections, and K with slots = 1, where it is a share of the tokens (after Fedus et al. 2021,
    arXiv 2101.03961, eq. 4 to 6). Shape: `sums` (1 + 2N,) of `selection_sums`.
    """
    n = sums.numel() // 2
    _, p, chosen = torch.split(sums, [1, n, n])
    frequency, probability = chosen / (slots * positions), p / positions
    return n * (frequency * probability).sum()
