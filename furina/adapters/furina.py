"""FURINA: a mixture of LoRA experts that routes itself and merges (arXiv 2509.14900).

    y = W x + b + Σ_shared s·B_j A_j x + Σ_routed diag(v) Ŵ_i x,   Ŵ_i = diag(d̃_i)^-1 B_i A_i

An expert whose rows point along x speaks loudly, and nothing else can make it loud: directions are
normalised per output unit and one magnitude vector v scales them all. The update is linear in x, so
the mixture is one LoRA of rank N·r: h = A x, Δy = B̃ h with B̃ = [s·B_shared, diag(v/d̃_i) B_i].

No k×d product is ever formed in training:
    d̃_i² = rowsum((B_i L_i)²) + ε²,  A_i A_iᵀ = L_i L_iᵀ        (with a
    |Ŵ_i x|² = h_iᵀ (Û_iᵀ Û_i) h_i,   Û_i = diag(d̃_i)^-1 B_i      Cholesky factor for stability)

Shape legend: T tokens, I = d in_features, O = k out_features, N experts, S shared, R = N − S
routed, r rank of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from furina.adapters.base import (
    AdapterConfig,
    AdapterLinear,
    Mergeability,
    ParameterCount,
    kaiming_uniform,
    no_autocast,
    register,
    zeros,
)
from furina.adapters.dropout import dropout
from furina.adapters.lora import lora_scale
from furina.context import ForwardTracker


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
            "selection_coefficient > 0 (all of them would always be selected)",
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
        vectors = self.num_routed_experts if self.magnitude == "per_expert" else 1
        vectors = min(vectors, self.num_routed_experts)
        adapters = self.num_experts * self.rank * (in_features + out_features)
        trainable = adapters + vectors * out_features
        return ParameterCount(trainable, router=0, active=trainable)

    def learning_rate_multipliers(self) -> dict[str, float]:
        """Give v its own learning rate."""
        return {"magnitude": self.magnitude_lr_multiplier}

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return α·reduce(L_div + L_bal) from each linear's sums over `tokens` real tokens.

        L_div = 1 − share/T; L_bal = R Σ_i F_i P_i with F_i = count_i/(K·T) and P_i = p_i/T, which
        is 1 at balance (section 3.3 of the paper; the definitions are our reading of its words).
        Shape: each statistic is (1 + 2R,), see `FurinaLinear.selection_statistics`.
        """
        r = self.num_routed_experts
        share, p, count = torch.split(
            torch.stack(list(statistics.values())) / tokens, [1, r, r], dim=1
        )
        divergence = 1 - share[:, 0]
        balance = r * (count / self.top_k * p).sum(1)
        loss = divergence + balance
        total = loss.sum() if self.selection_reduction == "sum" else loss.mean()
        return self.selection_coefficient * total


class Directions(NamedTuple):
    """B̃ (O, N·r), such that Δy = B̃ A x, and the routed Û = diag(d̃)^-1 B (O, R, r) in it."""

    b: Tensor
    routed: Tensor


def directions(config: FurinaConfig, a: Tensor, b: Tensor, v: Tensor | None) -> Directions:
    """Return B̃ = [s·B_shared, diag(v) Û] and Û, in the dtype of the parameters.

    Shape: A (N·r, I), B (O, N·r), v (O,) or (R, O); None without routed experts.
    """
    r, shared_rank = config.rank, config.num_shared_experts * config.rank
    shared = b[:, :shared_rank] * config.scale
    if v is None:
        return Directions(shared, shared.new_zeros(b.shape[0], 0, r))
    routed = b[:, shared_rank:].reshape(b.shape[0], -1, r)
    experts = a[shared_rank:].view(-1, r, a.shape[1])
    norm: Tensor = ExpertRowNorm.apply(experts, routed, config.eps)  # type: ignore[no-untyped-call]
    routed = routed / (norm.detach() if config.detach_norm else norm)[..., None]
    v = v * config.scale if config.scale_routed else v
    v = v[:, None, None] if v.dim() == 1 else v.t()[..., None]
    return Directions(torch.cat([shared, (v * routed).flatten(1)], dim=1), routed)


class ExpertRowNorm(torch.autograd.Function):
    """d̃_i = sqrt(rowsum((B_i L_i)²) + ε²) for every expert, where A_i A_iᵀ = L_i L_iᵀ.

    The factor keeps the digits that rowsum((B_i G_i)∘B_i) cancels when A_i is nearly of rank one,
    and the root is finite with a finite gradient at an all-zero row.
    Shape: A (R, r, I), B (O, R, r) → (O, R).
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, eps: float) -> Tensor:
        """Factor the Gram matrices in float64 and sum squares."""
        wide = a.to(torch.float64)
        gram = wide @ wide.mT
        # Relative to each row, so that a small row next to large ones keeps its digits.
        jitter = 4 * a.shape[1] * torch.finfo(torch.float64).eps * gram.diagonal(dim1=-2, dim2=-1)
        jitter = jitter + torch.finfo(torch.float64).tiny
        factor, _ = torch.linalg.cholesky_ex(gram + torch.diag_embed(jitter))
        factor = factor.to(a.dtype)
        product = torch.einsum("kri,rij->krj", b, factor)
        norm = (product.square().sum(-1) + eps**2).sqrt()
        ctx.save_for_backward(a, b, factor, product, norm)
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Use ∂d̃/∂B = B G / d̃ and ∂d̃/∂A = Bᵀ diag(1/d̃) B A, per expert."""
        a, b, factor, product, norm = ctx.saved_tensors
        weight = (gradient / norm)[..., None]
        grad_b = weight * torch.einsum("krj,rij->kri", product, factor)
        grad_a = torch.einsum("kri,krj->rij", weight * b, b) @ a
        return grad_a, grad_b, None


class FurinaLinear(AdapterLinear):
    """A linear with S shared and R self-routed low-rank experts, stacked shared first."""

    start_A: Tensor
    start_B: Tensor

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: FurinaConfig
    ) -> None:
        """Draw the experts: A (N·r, I), B (O, N·r), v (O,) or (R, O), so that ΔW starts at 0."""
        super().__init__(base, name, tracker)
        self.config = config
        n, s, r = config.num_experts, config.num_shared_experts, config.rank
        d, k = base.in_features, base.out_features
        self.shared_rank = s * r
        self.lora_A = kaiming_uniform(n * r, d, d, like=self)
        self.lora_B = kaiming_uniform(k, n * r, r, like=self)
        first_zero = n * r if config.start == "zero_b" else self.shared_rank
        with torch.no_grad():
            self.lora_B[:, :first_zero] = 0
        if config.num_routed_experts:
            self.magnitude = self._initial_magnitude()
        if config.start == "subtract" and config.num_routed_experts:
            self._remember_start()
        self._cached: tuple[object, Tensor] | None = None

    def _initial_magnitude(self) -> nn.Parameter:
        config, k = self.config, self.base.out_features
        shape = (k,) if config.magnitude == "shared" else (config.num_routed_experts, k)
        v = zeros(*shape, like=self)
        with torch.no_grad():
            if config.start == "zero_b":
                v.fill_(1.0)
            elif config.start == "subtract":
                norm = torch.linalg.vector_norm(self.base.weight.to(v.dtype), dim=1)
                v.copy_((norm / config.num_routed_experts).expand(shape))
        return v

    def _remember_start(self) -> None:
        """Keep the initial routed update, which the forward subtracts ("subtract" start)."""
        with torch.no_grad():
            b = self.directions().b.clone()
        # With the shared experts' zeros: the same shapes round alike, so the start cancels exactly.
        self.register_buffer("start_B", b)
        self.register_buffer("start_A", self.lora_A.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply W x + b + B̃ A dropout(x). Shape: (..., I) → (..., O)."""
        y: Tensor = self.base(x)
        x = dropout(x, self.config.dropout, self.training)
        h = functional.linear(x, self.lora_A.to(x.dtype))
        recording = self.must_record(self.config.has_auxiliary_loss)
        if torch.is_grad_enabled() or recording:
            directions, self._cached = self.directions(), None
            b = directions.b.to(x.dtype)
            if recording:
                self.tracker.record(self.name, self.selection_statistics(x, h, directions.routed))
        else:
            b = self._inference_b(x.dtype)
        update = functional.linear(h, b)
        if self.config.start == "subtract" and self.config.num_routed_experts:
            update = update - self._start_update(x)
        return y + update.to(y.dtype)

    def directions(self) -> Directions:
        """Return B̃ and Û of this layer's parameters."""
        with no_autocast(self.lora_A.device):
            v = getattr(self, "magnitude", None)
            return directions(self.config, self.lora_A, self.lora_B, v)

    def selection_statistics(self, x: Tensor, h: Tensor, routed: Tensor) -> Tensor:
        """Return the sums over real tokens of [Σ_topK p_t, p_t (R), 1[i ∈ top K] (R)].

        They have no gradient until v has moved: with v = 0 the task gives A and B no gradient, and
        Adam would turn the selection loss alone into a full step, whatever its coefficient.
        Shape: x (..., I), h (..., N·r), routed (O, R, r) → (1 + 2R,).
        """
        with no_autocast(h.device):
            activity = self.activity(h.reshape(-1, h.shape[-1]), routed)
        p = activity / activity.sum(-1, keepdim=True)
        top = p.topk(self.config.top_k, dim=-1)
        chosen = torch.zeros_like(p).scatter(-1, top.indices, 1.0)
        sums = torch.cat([top.values.sum(-1, keepdim=True), p, chosen], dim=-1).mean(1)
        assert self.tracker.active is not None
        mask = self.tracker.active.real_tokens(x, self.name)
        if mask is not None:
            sums = sums.masked_fill(~mask, 0.0)
        total = sums.sum(0)
        moved = (self.magnitude.detach() != 0).any()
        return torch.where(moved, total, total.detach())

    def activity(self, h: Tensor, routed: Tensor) -> Tensor:
        """Return each routed expert's activity n from h = A x, by `config.activity`.

        Shape: (T, N·r), (O, R, r) → (T, 1, R), or (T, O, R) for "per_unit".
        """
        experts, rank, eps = self.config.num_routed_experts, self.config.rank, self.config.eps
        h = h[:, self.shared_rank :].to(routed.dtype).view(-1, experts, rank)
        if self.config.activity == "l2":
            gram = torch.einsum("krs,krt->rst", routed, routed)
            square = (torch.einsum("nrs,rst->nrt", h, gram) * h).sum(-1)
            return (square.clamp(min=0) + eps**2).sqrt()[:, None]
        a = torch.einsum("krs,nrs->nkr", routed, h).abs()
        return a + eps if self.config.activity == "per_unit" else a.sum(1, keepdim=True) + eps

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (B̃, A) in float64: one LoRA of rank N·r, or (N+R)·r with the "subtract" start."""
        wide = {name: value.to(torch.float64) for name, value in self.adapter_tensors().items()}
        a, b = wide["lora_A"], wide["lora_B"]
        b = directions(self.config, a, b, wide.get("magnitude")).b
        if "start_B" in wide:
            b = torch.cat([b, -wide["start_B"][:, self.shared_rank :]], dim=1)
            a = torch.cat([a, wide["start_A"][self.shared_rank :]], dim=0)
        return b, a

    @property
    def records_statistics(self) -> bool:
        """Whether there are experts to select from."""
        return self.config.records_selection

    def auxiliary_slices(self) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
        """Return the routed experts' rows of A and columns of B, which the loss specialises."""
        routed = slice(self.shared_rank, None)
        return [(self.lora_A, (routed,)), (self.lora_B, (slice(None), routed))]

    def _start_update(self, x: Tensor) -> Tensor:
        h = functional.linear(x, self.start_A.to(x.dtype))
        return functional.linear(h, self.start_B.to(x.dtype))

    def _inference_b(self, dtype: torch.dtype) -> Tensor:
        """Return B̃ in `dtype`, kept between forwards until a parameter changes.

        Autograd does not count writes through `.data`: call `model.eval()` after such a write.
        """
        tensors = (self.lora_A, self.lora_B, getattr(self, "magnitude", self.lora_A))
        if any(tensor.grad is not None for tensor in tensors):
            # A step may come, and fused optimisers leave no trace in `_version`.
            return self.directions().b.to(dtype)
        key = (dtype, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self.directions().b.to(dtype)
        return self._cached[1]

    def train(self, mode: bool = True) -> FurinaLinear:
        """Switch the mode and forget B̃."""
        self._cached = None
        super().train(mode)
        return self
