"""FlyLoRA: every rank is an expert, and A selects (Zou et al. 2025, arXiv 2510.08396).

    a = A x,   S = the K ranks with the largest |a_i + d_i|,   y = W x + b + s·B (a ⊙ 1_S)

A is a frozen sparse random projection, so there is no router. The bias d only steers the selection:
after an optimiser step each d_i moves by u towards the mean load, d_i += u·sign(mean(c) − c_i),
with c_i the number of real tokens that selected rank i in that step, on all ranks of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.adapters.base import (
    AdapterConfig,
    Mergeability,
    ParameterCount,
    drawn_on,
    register,
    zeros,
)
from furina.adapters.lora import lora_scale
from furina.adapters.mixture import MixtureLinear
from furina.errors import NotMergeableError
from furina.kernels.dropout import dropout
from furina.kernels.forward import ForwardTracker, Operands
from furina.kernels.product import update_dtype


@register("flylora")
@dataclass(frozen=True)
class FlyLoRAConfig(AdapterConfig):
    """Options of FlyLoRA."""

    summary: ClassVar[str] = "frozen sparse A that selects the ranks of B for each token"
    source: ClassVar[str] = "Zou et al. 2025, arXiv 2510.08396"
    parameter_formula: ClassVar[str] = "r·k; A is frozen"
    deviations: ClassVar[str] = (
        "Selection by |A x + d| as in the released module; the released training code selects by "
        "the signed sum (selection: signed). Gradients reach x, there they are blocked. The bias "
        "moves once per optimiser step in training, there in every forward, evaluation included. "
        "A PEFT merge of released weights leaves the selection out; this one refuses. Published "
        "runs have dropout 0. Whether the paper adds d inside or outside |·| was not verified."
    )

    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input; published runs have none."""
    rank: int = 32
    """Total rank r."""
    active_rank: int = 8
    """Number K of ranks that act on a token."""
    alpha: float | None = None
    """Numerator of the scale; 2r when not given."""
    selection: Literal["abs", "signed"] = "abs"
    """Select by |A x + d|, or by A x + d."""
    bias_step: float = 1e-3
    """Step u of the selection bias; 0 leaves it at zero."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.rank > 0, "rank", "at least 1")
        self.require(
            0 < self.active_rank <= self.rank, "active_rank", f"between 1 and rank={self.rank}"
        )
        self.require(self.alpha is None or self.alpha > 0, "alpha", "positive")
        self.require(self.bias_step >= 0, "bias_step", "0 or larger")

    @property
    def scale(self) -> float:
        """The factor s = α/r, from the total rank."""
        return lora_scale(self.rank, self.alpha, use_rslora=False)

    @property
    def selects(self) -> bool:
        """Whether some ranks are left out."""
        return self.active_rank < self.rank

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> FlyLoRALinear:
        """Wrap one linear."""
        return FlyLoRALinear(base, name, tracker, self)

    def mergeability(self) -> Mergeability:
        """Merge where every rank acts on every token."""
        if self.selects:
            return Mergeability(False, "the ranks that act are selected anew for every token")
        return Mergeability(True, "all ranks act on every token, so it is an ordinary LoRA")

    def count(self, in_features: int, out_features: int, name: str = "") -> ParameterCount:
        """Return r·k: A is frozen."""
        return ParameterCount(
            self.rank * out_features, router=0, active=self.active_rank * out_features
        )


class FlyLoRALinear(MixtureLinear):
    """A linear with a frozen sparse A (r, I), a trained B (O, r) and a selection bias d (r,)."""

    lora_A: Tensor
    selection_bias: Tensor

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: FlyLoRAConfig
    ) -> None:
        """Draw A with max(1, ⌊I·K/r⌋) entries from N(0, 1/r²) in each row, and set B to zero."""
        super().__init__(base, name, tracker)
        self.config, self.dropout = config, config.dropout
        d, r = base.in_features, config.rank
        entries = max(1, d * config.active_rank // r)
        drawn = drawn_on(base.weight)
        values = torch.randn(r, entries, dtype=self.parameter_dtype, device=drawn) / r
        places = torch.rand(r, d, dtype=torch.float32, device=drawn).argsort(dim=1)[:, :entries]
        a = torch.zeros(r, d, dtype=self.parameter_dtype, device=drawn)
        a = a.scatter(1, places, values).to(base.weight.device)
        self.register_buffer("lora_A", a)
        self.register_buffer("selection_bias", a.new_zeros(r))
        self.lora_B = zeros(base.out_features, r, like=self)
        tracker.sum_over_step(name)

    def forward(self, x: Tensor) -> Tensor:
        """Apply W x + b + s·B [(A dropout(x)) ⊙ 1_S]. Shape: (..., I) → (..., O)."""
        dtype = update_dtype(x)
        a, b, _ = self.operands(x, dtype)
        y: Tensor = self.base(x)
        h = functional.linear(dropout(x, self.drop_rate).to(dtype), a.to(dtype))
        if self.config.selects:
            h = h * self._selected(x, h)
        return y + functional.linear(h * self.config.scale, b.to(dtype)).to(y.dtype)

    def derive(self) -> Operands:
        """Return A and B."""
        return Operands(self.lora_A, self.lora_B)

    @torch.no_grad()
    def _selected(self, x: Tensor, h: Tensor) -> Tensor:
        """Return 1_S in h's dtype, and note the load in training. Shape: (..., r)."""
        indices = self._score(h).topk(self.config.active_rank, dim=-1).indices
        selected = torch.zeros_like(h).scatter(-1, indices, 1.0)
        if self.steers and self.tracker.active is not None:
            mask = self.real_tokens(x)
            load = selected.flatten(0, -2).to(self.selection_bias.dtype)
            load = (load if mask is None else load.masked_fill(~mask, 0.0)).sum(0)
            self.tracker.record(self.name, load)
        return selected

    def _score(self, h: Tensor) -> Tensor:
        """Return what the ranks are selected by. Shape: (..., r) → (..., r)."""
        score = h.to(self.selection_bias.dtype) + self.selection_bias
        return score.abs() if self.config.selection == "abs" else score

    @property
    def refusal(self) -> str | None:
        """Why there is no choice, or none that shares of an activity could tell."""
        if not self.config.selects:
            return "all ranks act on every token"
        if self.config.selection == "signed":
            return "it selects by signed scores, which are no shares of an activity"
        return None

    @property
    def most_active(self) -> int:
        """The number of ranks that act on a token: each is an expert."""
        return self.config.active_rank

    @torch.no_grad()
    def activity(self, x: Tensor) -> Tensor:
        """Return the shares of |A x + d|, which selects. Shape: (T, I) → (T, 1, r)."""
        score = self._score(functional.linear(x.to(self.lora_A.dtype), self.lora_A))
        score = score.clamp(min=torch.finfo(score.dtype).tiny)
        return (score / score.sum(-1, keepdim=True))[:, None]

    @torch.no_grad()
    def experts(self) -> tuple[Tensor, Tensor]:
        """Return the ranks as experts. Shape: (r, O, 1), (r, 1, I)."""
        b, a = self.lora_B.to(torch.float64), self.lora_A.to(torch.float64)
        return b.T[:, :, None], a[:, None]

    @property
    def steers(self) -> bool:
        """Whether the load steers the bias: in training only."""
        return self.training and self.config.selects and self.config.bias_step > 0

    def step_statistics(self) -> Tensor | None:
        """Return the loads since the last optimiser step. Shape: (r,)."""
        return self.tracker.take(self.name)

    def after_step(self, statistics: Tensor) -> None:
        """Move the bias of every rank towards the mean load."""
        step = self.config.bias_step * (statistics.mean() - statistics).sign()
        self.selection_bias += step.to(self.selection_bias.dtype)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (s·B, A) in float64 if all ranks act; refuse with the reason otherwise."""
        if self.config.selects:
            raise NotMergeableError(f"{self.name}: {self.config.mergeability().reason}.")
        return self.config.scale * self.lora_B.to(torch.float64), self.lora_A.to(torch.float64)
