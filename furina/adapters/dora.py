"""DoRA: magnitude and direction of W apart (Liu et al. 2024, arXiv 2402.09353, eq. 5 and 11).

    y = (m/n) ⊙ (W + s·B A) x + b,   n = ‖W + s·B A‖ per row, without gradient

No k×d product is formed in training:
    n² = rowsum(W²) + 2s·rowsum((W Aᵀ) ∘ B) + s²·rowsum((B A Aᵀ) ∘ B)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from furina.adapters.base import (
    AdapterLinear,
    Mergeability,
    ParameterCount,
    kaiming_uniform,
    register,
    zeros,
)
from furina.adapters.lora import LoRAConfig
from furina.kernels.dropout import dropout
from furina.kernels.forward import ForwardTracker, Operands
from furina.kernels.product import low_rank_product, no_autocast, update_dtype


@register("dora")
@dataclass(frozen=True)
class DoRAConfig(LoRAConfig):
    """Options of DoRA."""

    summary: ClassVar[str] = "LoRA on the direction of W, and a magnitude per output unit"
    source: ClassVar[str] = "Liu et al. 2024, arXiv 2402.09353"
    parameter_formula: ClassVar[str] = "r(d+k)+k"

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> DoRALinear:
        """Wrap one linear."""
        return DoRALinear(base, name, tracker, self)

    def mergeability(self) -> Mergeability:
        """Say why DoRA merges."""
        return Mergeability(True, "W + s·B A, rescaled per row, does not depend on the input")

    def peft_options(self) -> dict[str, object]:
        """Ask for peft's DoRA."""
        return {"use_dora": True}

    def count(self, in_features: int, out_features: int, name: str = "") -> ParameterCount:
        """Return r(d+k) + k."""
        trainable = self.rank * (in_features + out_features) + out_features
        return ParameterCount(trainable, router=0, active=trainable)


class DoRALinear(AdapterLinear):
    """A linear whose rows are turned by a low-rank update and rescaled to the magnitude m (O,)."""

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: DoRAConfig
    ) -> None:
        """Draw A (r, I) as nn.Linear does, set B (O, r) to zero and m to W's row norms."""
        super().__init__(base, name, tracker)
        self.dropout, self.scale = config.dropout, config.scale
        d, k = base.in_features, base.out_features
        self.lora_A = kaiming_uniform(config.rank, d, d, like=self)
        self.lora_B = zeros(k, config.rank, like=self)
        self.magnitude = nn.Parameter(self.row_norm())

    def forward(self, x: Tensor) -> Tensor:
        """Apply (m/n) ⊙ (W + s·B A) x + b. Shape: (..., I) → (..., O).

        Where elements of x are dropped, x' = dropout(x), it is W x + b and beside it
        (m/n − 1) ⊙ W x' + (m/n) ⊙ s·B A x', which is a second product with W.
        """
        a, b, (norm,) = self.operands(x, update_dtype(x))
        turn, p = self.ratio(norm) - 1, self.drop_rate
        if p:
            y: Tensor = self.base(x)
            x = dropout(x, p)
            plain = functional.linear(x, self.base.weight)
            h = functional.linear(x, a.to(x.dtype)) * self.scale
            update = functional.linear(h, b.to(x.dtype))
            return y + turn.to(y.dtype) * plain + (turn + 1).to(y.dtype) * update
        y, _ = low_rank_product(self.base, x, a, b, scale=self.scale)
        turn = turn.to(y.dtype)
        bias: Tensor | None = self.base.bias
        if bias is not None:
            return torch.addcmul(y, y - bias.to(y.dtype), turn)
        stretched: Tensor = _Stretch.apply(y, turn)  # type: ignore[no-untyped-call]
        return stretched

    def derive(self) -> Operands:
        """Return A and B, and n (O,), which has no gradient."""
        return Operands(self.lora_A, self.lora_B, (self.row_norm(),))

    def ratio(self, norm: Tensor) -> Tensor:
        """Return m/n, and 1 for a row of zeros, which has no direction. Shape: (O,)."""
        tiny = torch.finfo(norm.dtype).tiny
        magnitude = self.magnitude.to(norm.dtype)
        return torch.where(norm > 0, magnitude / norm.clamp(min=tiny), torch.ones_like(magnitude))

    @torch.no_grad()
    def row_norm(self) -> Tensor:
        """Return n, at least fp32, from r-sized products. Shape: (O,)."""
        with no_autocast(self.lora_A.device):
            weight = self.base.weight.detach()
            a, b = self.lora_A, self.lora_B * self.scale
            cross = functional.linear(weight, a.to(weight.dtype)).to(b.dtype)
            square = 2 * (cross * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
            own: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
            return (own.to(self.parameter_dtype) + square).clamp(min=0).sqrt()

    def peft_state(self) -> dict[str, Tensor]:
        """Return peft's DoRA of scale 1: A, s·B and m."""
        return {
            "lora_A.weight": self.lora_A.detach(),
            "lora_B.weight": self.scale * self.lora_B.detach(),
            "lora_magnitude_vector": self.magnitude.detach(),
        }

    def factors(self) -> None:
        """Return nothing: rescaling the rows of W has full rank."""
        return None

    @torch.no_grad()
    def delta(self) -> Tensor:
        """Return (m/n) ⊙ (W + s·B A) − W in float64. Shape: (O, I)."""
        weight = self.pristine_weight.to(self.lora_A.device, torch.float64)
        turned = weight + self.scale * self.lora_B.to(torch.float64) @ self.lora_A.to(torch.float64)
        return self.ratio(turned.norm(dim=1))[:, None] * turned - weight


class _Stretch(torch.autograd.Function):
    """y + δ ⊙ y in one pass; δ = m/n − 1 keeps digits in bf16 that m/n would lose."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, delta: Tensor) -> Tensor:
        """Stretch each output unit. Shape: (..., O), (O,) → (..., O)."""
        ctx.save_for_backward(y, delta)
        return torch.addcmul(y, y, delta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Stretch the gradient, too."""
        y, delta = ctx.saved_tensors
        return torch.addcmul(gradient, gradient, delta), (gradient * y).flatten(0, -2).sum(0)
