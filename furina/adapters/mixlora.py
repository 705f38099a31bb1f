"""MixLoRA: top-K routing between whole FFNs (Li et al. 2024, arXiv 2404.15159).

    FFN(x) = Σ_{e in top K} w_e W₂ₑ [act(W₁ₑ x) ⊙ W₃ₑ x],   Wᵢₑ = Wᵢ + s·Bᵢₑ Aᵢₑ

with one router per block, w = softmax(G x) on the top K, rescaled to 1. Attention linears get plain
LoRA. The activation stands between the experts, so they cannot be one LoRA with weights.

The gate's linear routes and gives its output once per selected expert, in a new first dimension
that the block's own elementwise arithmetic carries along and the down linear sums up:
  * W₁ x and W₃ x are computed once, for all K;
  * Σ_k w_k W₂ a_k = W₂ Σ_k w_k a_k is one product, too.

The load balancing loss pools all layers, with f_e the selections of expert e per token (the
released reduction; K at perfect balance):

    L = α N Σ_e f_e P_e

Shape legend: K selected of N experts, T tokens, r rank, I = d in_features, O = k out_features.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.adapters.base import AdapterLinear, register
from furina.adapters.lora import LoRAConfig, LoRALinear
from furina.adapters.routing import RoutedLinear, TopKConfig, load_balancing
from furina.errors import ConfigurationError
from furina.kernels.dropout import dropout
from furina.kernels.forward import ForwardTracker
from furina.kernels.product import update_dtype

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@register("mixlora")
@dataclass(frozen=True)
class MixLoRAConfig(TopKConfig):
    """Options of MixLoRA."""

    summary: ClassVar[str] = "top-K routing between whole FFNs, LoRA on attention"
    source: ClassVar[str] = "Li et al. 2024, arXiv 2404.15159"
    parameter_formula: ClassVar[str] = "r(d+k); N·r(d+k) in an FFN, and N·d for its router"
    deviations: ClassVar[str] = (
        "No router noise (released default 0). One dropout mask for all experts of the "
        "gate and up linears; down's selected experts, whose inputs differ, have one each. "
        "Released evaluation leaves dropout on and its fast backward ignores the mask; not here. "
        "Coefficient 1e-3 as in the released defaults; its example configurations have 1e-2."
    )
    scope: ClassVar[Literal["linear", "block"]] = "block"
    router_start: ClassVar[Literal["kaiming", "normal"]] = "normal"

    num_experts: int = 8
    """Number N of experts of an FFN."""
    balance_coefficient: float = 1e-3
    """Weight α of the load balancing loss; 0 turns it off."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.num_experts > 0, "num_experts", "at least 1")
        self.require(self.top_k <= self.num_experts, "top_k", f"at most {self.num_experts}")
        self.require(self.balance_coefficient >= 0, "balance_coefficient", "0 or larger")

    @property
    def most_experts(self) -> int:
        """The number of experts of an FFN."""
        return self.num_experts

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the load balancing loss is on."""
        return self.balance_coefficient > 0 and self.records_selection

    def num_experts_of(self, name: str) -> int:
        """Return N in an FFN, 1 elsewhere."""
        return self.num_experts if _leaf(name) in (GATE, UP, DOWN) else 1

    def has_router(self, name: str) -> bool:
        """Return whether the linear called `name` holds its block's router: the gate's does."""
        return super().has_router(name) and _leaf(name) == GATE

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> AdapterLinear:
        """Wrap one linear: plain LoRA outside an FFN and for a single expert."""
        n = self.num_experts_of(name)
        if n == 1:
            lora = LoRAConfig(self.dropout, self.rank, self.alpha, self.use_rslora)
            return LoRALinear(base, name, tracker, lora)
        if self.router_removed:
            return RoutedLinear(base, name, tracker, self)
        layer = {GATE: MixLoRAGate, UP: MixLoRAUp, DOWN: MixLoRADown}[_leaf(name)]
        return layer(base, name, tracker, self)

    def link(self, layers: Mapping[str, AdapterLinear]) -> None:
        """Let the three linears of each FFN share their routing.

        Raises ConfigurationError where an FFN is adapted in part.
        """
        mixed = {n: layer for n, layer in layers.items() if isinstance(layer, MixLoRALinear)}
        if not mixed and not self.mergeability().ok:
            warnings.warn("No FFN is adapted, so MixLoRA is plain LoRA here.", stacklevel=3)
        for name, layer in mixed.items():
            parent = name.rpartition(".")[0]
            gate, *others = (
                layers.get(f"{parent}.{leaf}" if parent else leaf) for leaf in (GATE, UP, DOWN)
            )
            if not isinstance(gate, MixLoRAGate) or None in others:
                raise ConfigurationError(
                    f"MixLoRA mixes whole FFNs, but only a part of {parent or 'the model'} is "
                    f"adapted: put {GATE}, {UP} and {DOWN} into the targets together, or none."
                )
            layer.block = gate.block

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return α N Σ f P, pooled over the blocks' `selection_sums`."""
        pooled = torch.stack(list(statistics.values())).sum(0)
        loss = load_balancing(pooled, tokens * len(statistics), slots=1)
        return self.balance_coefficient * loss


class Routing(NamedTuple):
    """Which experts act on each token of a block, and how much."""

    selected: Tensor
    """One-hot. Shape: (K, ..., N)."""
    weights: Tensor
    """Sum to 1 over K. Shape: (K, ...)."""


class Block:
    """What the three linears of one FFN share during a forward; each thread has its own."""

    def __init__(self) -> None:
        """Start without a routing."""
        self._routings: dict[int, Routing] = {}

    def begin(self, routing: Routing) -> None:
        """Keep what the gate has just decided."""
        self._routings[_thread()] = routing

    def current(self, name: str, *, last: bool = False) -> Routing:
        """Return what the gate has just decided, and forget it if this is the `last` linear."""
        routing = (self._routings.pop if last else self._routings.get)(_thread(), None)
        if routing is None:
            raise ConfigurationError(
                f"{name} ran before its block's {GATE}, which routes: MixLoRA needs an FFN of the "
                "form down(act(gate(x)) * up(x))."
            )
        return routing

    def __getstate__(self) -> dict[str, object]:
        """Leave the last forward out of copies and pickles."""
        return {"_routings": {}}


def _thread() -> int:
    """Tell threads apart; a trace belongs to none."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class MixLoRALinear(RoutedLinear):
    """One linear of a mixed FFN: A (N·r, I) and B (O, N·r) of all experts."""

    config: MixLoRAConfig

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: MixLoRAConfig
    ) -> None:
        """Draw the experts; `link` puts in the block of the gate."""
        super().__init__(base, name, tracker, config)
        self.block = Block()

    def low_rank(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return A dropout(x) per expert, in `dtype`. Shape: (..., I) → (..., N, r)."""
        a = self.operands(x, dtype).a
        h = functional.linear(dropout(x, self.drop_rate).to(dtype), a.to(dtype))
        return h.reshape(*h.shape[:-1], self.num_experts, self.config.rank)

    def update(self, z: Tensor) -> Tensor:
        """Return s·B z. Shape: (..., N, r) → (..., O)."""
        b = self.operands(z, z.dtype).b
        return functional.linear(self.config.scale * z.flatten(-2), b.to(z.dtype))

    def per_expert(self, x: Tensor, routing: Routing) -> Tensor:
        """Return (W + s·B_e A_e) x for each selected e. Shape: (..., I) → (K, ..., O)."""
        y: Tensor = self.base(x)
        z = self.low_rank(x, update_dtype(x))
        z = z * routing.selected.to(z.dtype)[..., None]
        return y + self.update(z).to(y.dtype)


class MixLoRAGate(MixLoRALinear):
    """The gate's linear, which routes for its block."""

    def forward(self, x: Tensor) -> Tensor:
        """Route x and apply each selected expert. Shape: (..., I) → (K, ..., O)."""
        routing = self.route(x)
        self.block.begin(routing)
        return self.per_expert(x, routing)

    def route(self, x: Tensor) -> Routing:
        """Select the K most probable experts, with weights rescaled to 1. Shape: (..., I)."""
        p = self.probabilities(x)
        kept = p.topk(self.config.top_k, dim=-1)
        weights = kept.values / kept.values.sum(-1, keepdim=True)
        # K comes first in memory as well: of other strides matmul copies a weight for each row.
        indices, weights = (each.movedim(-1, 0).contiguous() for each in (kept.indices, weights))
        selected = functional.one_hot(indices, self.num_experts)
        self.record(x, lambda: (p.flatten(0, -2), selected.sum(0).flatten(0, -2)))
        return Routing(selected, weights)


class MixLoRAUp(MixLoRALinear):
    """The up linear, which follows the gate's routing."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply each selected expert. Shape: (..., I) → (K, ..., O)."""
        return self.per_expert(x, self.block.current(self.name))


class MixLoRADown(MixLoRALinear):
    """The down linear, which sums up the experts."""

    def forward(self, a: Tensor) -> Tensor:
        """Return Σ_k w_k (W + s·B_e A_e) a_k + b. Shape: (K, ..., I) → (..., O)."""
        routing = self.block.current(self.name, last=True)
        weights = routing.weights.to(a.dtype)[..., None]
        if weights.shape[:-1] != a.shape[:-1]:
            raise ConfigurationError(
                f"{self.name} got an input of shape {tuple(a.shape)} for {len(weights)} experts: "
                "MixLoRA needs an FFN of the form down(act(gate(x)) * up(x))."
            )
        # The weights sum to 1: in this form equal experts give exactly what one gives.
        mixed = a[0] + (weights[1:] * (a[1:] - a[0])).sum(0)
        dtype = update_dtype(mixed)
        gates = (routing.selected * routing.weights[..., None]).to(dtype)
        z = (self.low_rank(a, dtype) * gates[..., None]).sum(0)
        y: Tensor = self.base(mixed)
        return y + self.update(z).to(y.dtype)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
