"""FURINA: a mixture of LoRA experts that routes itself and merges (arXiv 2509.14900).

    y = W x + b + Σ_shared s·B_j A_j x + Σ_routed diag(v) Ŵ_i x,   Ŵ_i = diag(d̃_i)^-1 B_i A_i

An expert whose rows point along x speaks loudly, and nothing else can make it loud: directions are
normalised per output unit and one magnitude vector v scales them all. The update is linear in x, so
the mixture is one LoRA of rank N·r: h = A x, Δy = B̃ h with B̃ = [s·B_shared, diag(v/d̃_i) B_i].

This is the fast form of the equations in `furina/reference.py`. No k×d product is ever formed in
training: `furina/kernels/directions.py` gets d̃ and the activities |Ŵ_i x| from r×r matrices.

Shape legend: T tokens, I = d in_features, O = k out_features, N experts, S shared, R = N − S
routed, r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.adapters.base import (
    AdapterConfig,
    Mergeability,
    ParameterCount,
    kaiming_uniform,
    register,
    zeros,
)
from furina.adapters.lora import lora_scale
from furina.adapters.mixture import MixtureLinear, Parts
from furina.kernels import directions as kernel
from furina.kernels.forward import ForwardTracker, Operands, Record
from furina.kernels.product import low_rank_product, moved_product, no_autocast, update_dtype


@register("furina")
@dataclass(frozen=True)
class FurinaConfig(AdapterConfig):
    """Options of FURINA; the defaults are the readings that `results/` supports."""

    summary: ClassVar[str] = "router-free mixture of LoRA experts, one shared magnitude"
    source: ClassVar[str] = "Han et al. 2025, arXiv 2509.14900 (no code released)"
    parameter_formula: ClassVar[str] = "N·r(d+k)+k"

    rank: int = 16
    """Rank r of each expert."""
    num_experts: int = 8
    """Number N of experts, shared ones included."""
    num_shared_experts: int = 1
    """Number S of ordinary LoRA experts that are always added."""
    alpha: float | None = None
    """Numerator of the shared experts' scale; 2r when not given."""
    use_rslora: bool = False
    """Scale by α/√r in place of α/r."""
    scale_routed: bool = False
    """Apply the scale to the routed experts too; by default v alone scales them."""
    magnitude: Literal["shared", "per_expert"] = "shared"
    """One v (k,) for all routed experts, or one per expert (R, k) (paper table 4)."""
    magnitude_lr_multiplier: float = 20.0
    """Factor on v's learning rate: v lives on the scale of |W|, A and B on 1/√d."""
    start: Literal["zero_magnitude", "zero_b", "subtract"] = "zero_magnitude"
    """How the start equals the base: v = 0 with random B; B = 0 with v = 1; or v = |W|_row / R
    with the initial update subtracted."""
    detach_norm: bool = False
    """Stop the gradient through the norms d̃, as DoRA does."""
    eps: float = 1e-6
    """ε in d̃ and in the activity."""
    selection_coefficient: float = 0.01
    """Weight of the expert selection loss (the paper's α); 0 turns it off."""
    selection_reduction: Literal["mean", "sum"] = "sum"
    """How the losses of the adapted linears are combined."""
    activity: Literal["l2", "l1", "per_unit"] = "l2"
    """How an expert's output a_i (k,) becomes its activity: |a_i|, Σ|a_ij|, or per output unit."""
    top_k: int = 2
    """Number K of experts whose share of the activity is maximised."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.rank > 0, "rank", "at least 1")
        self.require(self.num_experts > 0, "num_experts", "at least 1")
        self.require(
            0 <= self.num_shared_experts <= self.num_experts,
            "num_shared_experts",
            f"between 0 and num_experts={self.num_experts}",
        )
        self.require(self.alpha is None or self.alpha > 0, "alpha", "positive")
        self.require(self.magnitude_lr_multiplier > 0, "magnitude_lr_multiplier", "positive")
        self.require(self.eps >= 1e-18, "eps", "at least 1e-18, whose square fp32 can hold")
        self.require(self.selection_coefficient >= 0, "selection_coefficient", "0 or larger")
        self.require(self.top_k > 0, "top_k", "at least 1")
        self.require(
            not self.has_auxiliary_loss or self.top_k < self.num_routed_experts,
            "top_k",
            f"smaller than the {self.num_routed_experts} self-routed experts while "
            "selection_coefficient > 0, as else all are selected: lower it, raise num_experts, or "
            "set the coefficient to 0",
        )

    @property
    def num_routed_experts(self) -> int:
        """R = N − S."""
        return self.num_experts - self.num_shared_experts

    @property
    def scale(self) -> float:
        """The factor s on the shared experts."""
        return lora_scale(self.rank, self.alpha, self.use_rslora)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the expert selection loss is on."""
        return self.selection_coefficient > 0

    @property
    def records_selection(self) -> bool:
        """Whether there are more than K self-routed experts to choose from."""
        return self.num_routed_experts > self.top_k

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> FurinaLinear:
        """Wrap one linear."""
        return FurinaLinear(base, name, tracker, self)

    def mergeability(self) -> Mergeability:
        """Say why every FURINA merges."""
        return Mergeability(True, "self-routing is linear in the input: one LoRA of rank N·r")

    def count(self, in_features: int, out_features: int, name: str = "") -> ParameterCount:
        """Return N·r(d+k) + k, or + R·k with one magnitude per expert."""
        routed = self.num_routed_experts
        vectors = min(routed, 1) if self.magnitude == "shared" else routed
        adapters = self.num_experts * self.rank * (in_features + out_features)
        trainable = adapters + vectors * out_features
        return ParameterCount(trainable, router=0, active=trainable)

    def learning_rate_multipliers(self) -> dict[str, float]:
        """Give v its own learning rate."""
        return {"magnitude": self.magnitude_lr_multiplier}

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return α·reduce(L_div + L_bal) of the linears' sums over `tokens` real tokens."""
        means = torch.stack(list(statistics.values())) / tokens
        return self.reduce(kernel.selection_losses(means, self.top_k))

    def reduce(self, losses: Tensor) -> Tensor:
        """Return α times the sum or mean of the linears' losses."""
        total = losses.sum() if self.selection_reduction == "sum" else losses.mean()
        return self.selection_coefficient * total

    def statistics(
        self, records: Mapping[str, Record], mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Return each linear's `selection_sums` from what `FurinaLinear.selection` recorded."""
        given = list(records.values())
        # "per_unit" is large, and not of one shape.
        groups = [[each] for each in given] if self.activity == "per_unit" else [given]
        sums = [kernel.selection_sums(self.activities(each), mask, self.top_k) for each in groups]
        return dict(zip(records, torch.cat(sums).unbind(), strict=True))

    def activities(self, records: Sequence[Record]) -> Tensor:
        """Return the routed experts' activity from what linears of one shape recorded.

        Shape: (linears, T, U, R), U = O output units apart with "per_unit", else 1.
        """
        if self.activity == "l2":
            h, gram, moved = zip(*records, strict=True)
            activity = kernel.l2_activity(h, gram, self.eps, torch.stack(moved))
            return activity[:, :, None, self.num_shared_experts :]
        return torch.stack([activity for (activity,) in records])


class FurinaLinear(MixtureLinear):
    """A linear with S shared and R self-routed low-rank experts, stacked shared first."""

    start_A: Tensor
    start_B: Tensor

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: FurinaConfig
    ) -> None:
        """Draw the experts: A (N·r, I), B (O, N·r), v (O,) or (R, O), so that ΔW starts at 0."""
        super().__init__(base, name, tracker)
        self.config, self.dropout = config, config.dropout
        n, s, r = config.num_experts, config.num_shared_experts, config.rank
        d, k = base.in_features, base.out_features
        self.shared_rank = s * r
        self.lora_A = kaiming_uniform(n * r, d, d, like=self)
        b = kaiming_uniform(k, n * r, r, like=self).detach()
        b[:, : n * r if config.start == "zero_b" else self.shared_rank] = 0
        self.lora_Bt = nn.Parameter(b.t().contiguous())
        if config.num_routed_experts:
            self.magnitude = self._initial_magnitude()
        if self.subtracts:
            self._remember_start()

    @property
    def lora_B(self) -> Tensor:  # noqa: N802
        """B (O, N·r). The parameter is Bᵀ: an expert's part of it is contiguous."""
        return self.lora_Bt.t()

    @property
    def subtracts(self) -> bool:
        """Whether the initial routed update is subtracted."""
        return self.config.start == "subtract" and self.config.num_routed_experts > 0

    @torch.no_grad()
    def _initial_magnitude(self) -> nn.Parameter:
        config, k = self.config, self.base.out_features
        shape = (k,) if config.magnitude == "shared" else (config.num_routed_experts, k)
        v = zeros(*shape, like=self)
        if config.start == "zero_b":
            v.fill_(1.0)
        elif config.start == "subtract":
            norm = torch.linalg.vector_norm(self.base.weight.to(v.dtype), dim=1)
            v.copy_((norm / config.num_routed_experts).expand(shape))
        return v

    @torch.no_grad()
    def _remember_start(self) -> None:
        """Keep the initial routed update, which the forward subtracts ("subtract" start)."""
        b = self._directions().b.clone()
        # With the shared experts' zeros: the same shapes round alike, so the start cancels exactly.
        self.register_buffer("start_B", b)
        self.register_buffer("start_A", self.lora_A.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply W x + b + B̃ A dropout(x). Shape: (..., I) → (..., O)."""
        if self.subtracts:
            a, b, extra = self.operands(x)
            start = self.start_A, self.start_B
            y, h = moved_product(self.base, x, (a, b), start, dropout=self.drop_rate)
        else:
            a, b, extra = self.operands(x, update_dtype(x))
            y, h = low_rank_product(self.base, x, a, b, dropout=self.drop_rate)
        self.record(x, lambda: self.selection(h, *extra))
        return y

    def derive(self) -> Operands | None:
        """Return A and B̃, and d̃ (N, O) and, where the selection loss needs it, M (N, r, r).

        Beside fp16, whose range B̃ leaves where A_i is next to nothing, A and B̃ are balanced by
        powers of two c (N·r,), the last of what is returned.
        """
        a, (b, *extra) = self.lora_A, self._directions()
        if self.base.weight.dtype != torch.float16:
            return Operands(a, b, tuple(extra))
        exponent = torch.frexp(b.detach().abs().amax(0)).exponent
        c = torch.ldexp(b.new_ones(b.shape[1]), (exponent - 10).clamp(min=0))
        return Operands(a * c[:, None], b / c, (*extra, c))

    def _directions(self, dtype: torch.dtype | None = None) -> kernel.Directions:
        """Return B̃, d̃ and, if a training forward records it, M; in `dtype` or the parameters'."""
        config, dtype = self.config, dtype or self.lora_A.dtype
        n, shared = config.num_experts, config.num_shared_experts
        options = kernel.ExpertOptions(n, shared, config.scale, config.eps, config.detach_norm)
        with_gram = self.training and config.has_auxiliary_loss and config.activity == "l2"
        with no_autocast(self.lora_A.device):
            v = self.magnitude.to(dtype) if config.num_routed_experts else None
            if v is not None and config.scale_routed:
                v = v * config.scale
            a, bt = self.lora_A.to(dtype), self.lora_Bt.to(dtype)
            return kernel.directions(a, bt, v, options, with_gram)

    def selection(self, h: Tensor, norm: Tensor, gram: Tensor, c: Tensor | None = None) -> Record:
        """Return what the experts' activity is made of: h, M and whether v has moved, with "l2".

        With "l1" and "per_unit" the activity itself, (T, 1, R) and (T, O, R). It has no gradient
        until v has moved: with v = 0 the task gives A and B no gradient, and Adam would turn the
        selection loss alone into a full step, whatever its coefficient.
        Shape: h (T, N·r), d̃ (N, O), M (N, r, r), c (N·r,) as in `derive`.
        """
        shared = self.config.num_shared_experts
        moved = (self.magnitude.detach() != 0).any()
        h = h if c is None else h / c.to(h.dtype)
        norm = norm.detach() if self.config.detach_norm else norm
        with no_autocast(h.device):
            if self.config.activity == "l2":
                known = gram.numel() > 0
                gram = gram if known else kernel.direction_gram(self.lora_Bt, norm, shared)
                return h, gram, moved
            b, h = (m.reshape(len(m), -1, self.config.rank)[:, shared:] for m in (self.lora_B, h))
            a = torch.einsum("krs,nrs->nkr", b / norm[shared:].t()[..., None], h.to(b.dtype)).abs()
            a = a if self.config.activity == "per_unit" else a.sum(1, keepdim=True)
            return (torch.where(moved, a, a.detach()) + self.config.eps,)

    @torch.no_grad()
    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return (B̃, A): one LoRA of rank N·r, or (N+R)·r with the "subtract" start."""
        b, a, rows = self._directions(dtype).b, self.lora_A.to(dtype), self.shared_rank
        if self.subtracts:
            b = torch.cat([b, -self.start_B.to(dtype)[:, rows:]], dim=1)
            a = torch.cat([a, self.start_A.to(dtype)[rows:]], dim=0)
        return b, a

    @property
    def refusal(self) -> str | None:
        """Why there is no choice: with fewer than two self-routed experts."""
        few = self.config.num_routed_experts < 2
        return "it has fewer than 2 self-routed experts" if few else None

    @property
    def most_active(self) -> int:
        """The number of experts whose share the selection loss maximises."""
        return self.config.top_k

    @torch.no_grad()
    def activity(self, x: Tensor) -> Tensor:
        """Return the self-routed experts' shares of the option `activity`'s kind.

        Computed in the parameters' dtype. Shape: (T, I) → (T, 1, R), or (T, O, R) with "per_unit".
        """
        a, (_, norm, gram) = self.lora_A, self._directions()
        with no_autocast(a.device):
            record = self.selection(functional.linear(x.to(a.dtype), a), norm, gram)
            activity = self.config.activities([record])[0]
        return activity / activity.sum(-1, keepdim=True)

    @torch.no_grad()
    def experts(self) -> tuple[Tensor, Tensor]:
        """Return the self-routed experts' directions Ŵ_i = diag(1/d̃_i) B_i · A_i."""
        n, shared, wide = self.config.num_experts, self.config.num_shared_experts, torch.float64
        a, bt = (each.to(wide).view(n, -1, each.shape[1]) for each in (self.lora_A, self.lora_Bt))
        return (bt / self._directions(wide).norm[:, None]).mT[shared:], a[shared:]

    @torch.no_grad()
    def parts(self, x: Tensor) -> Parts | None:
        """Return s Σ B_j A_j x and Σ diag(v) Ŵ_i x, less the initial one with "subtract"."""
        rows = self.shared_rank
        if rows in (0, len(self.lora_A)):
            return None
        b, a = self.factors(self.lora_A.dtype)
        with no_autocast(a.device):
            h = functional.linear(x.to(a.dtype), a)
            shared = functional.linear(h[:, :rows], b[:, :rows])
            return Parts(shared, functional.linear(h[:, rows:], b[:, rows:]))

    @property
    def records_statistics(self) -> bool:
        """Whether the expert selection loss is on."""
        return self.config.has_auxiliary_loss

    def auxiliary_slices(self) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
        """Return the routed experts' rows of A and Bᵀ, which the loss specialises."""
        routed = slice(self.shared_rank, None)
        return [(self.lora_A, (routed,)), (self.lora_Bt, (routed,))]
