"""PiSSA: LoRA that starts at W's principal part (Meng et al. 2024, arXiv 2404.02948, eq. 2 to 4).

With W = U Σ Vᵀ and its r largest singular values, s·B₀ A₀ = U_r Σ_r V_rᵀ and

    y = W x + b + s (B A − B₀ A₀) x

W itself is untouched, so the start is the base to the bit and the update an ordinary LoRA of rank
2r. In place, as the paper has it, W − s·B₀ A₀ takes W's place: one product less, for a start that
equals the base to rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from furina.adapters.base import register
from furina.adapters.lora import LoRAConfig, LoRALinear
from furina.adapters.product import moved_product
from furina.adapters.sharding import write
from furina.context import ForwardTracker


@register("pissa")
@dataclass(frozen=True)
class PiSSAConfig(LoRAConfig):
    """Options of PiSSA."""

    summary: ClassVar[str] = "LoRA that starts at the principal part of W"
    source: ClassVar[str] = "Meng et al. 2024, arXiv 2404.02948"
    deviations: ClassVar[str] = (
        "The initial update is subtracted beside an untouched W, where released code overwrites W; "
        "in_place does that too, and keeps W. Dropout acts on the update's input, so published "
        "runs have dropout 0."
    )

    dropout: float = 0.0
    """Probability of dropping an element of the adapter's input; the paper has none."""
    svd_iterations: int | None = None
    """Iterations of a randomised SVD; the exact one if none."""
    in_place: bool = False
    """Put the residual W − s·B₀ A₀ in W's place; a copy of W is kept on the CPU."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        iterations = self.svd_iterations
        self.require(iterations is None or iterations > 0, "svd_iterations", "at least 1, or none")

    @property
    def exact_start(self) -> bool:
        """Whether W is untouched."""
        return not self.in_place

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> PiSSALinear:
        """Wrap one linear."""
        return PiSSALinear(base, name, tracker, self)


class PiSSALinear(LoRALinear):
    """A linear with the principal factors A (r, I), B (O, r) and their frozen start."""

    start_A: Tensor
    start_B: Tensor

    def __init__(
        self, base: nn.Linear, name: str, tracker: ForwardTracker, config: PiSSAConfig
    ) -> None:
        """Take the factors from the SVD of W; raises ConfigurationError if r is more than its rank.

        Adapters of a linear narrower than r cannot be principal.
        """
        super().__init__(base, name, tracker, config)
        narrow = min(base.in_features, base.out_features)
        config.require(
            config.rank <= narrow, "rank", f"at most {narrow}, the narrow side of {name}"
        )
        a, b = self._principal(config)
        with torch.no_grad():
            self.lora_A.copy_(a)
            self.lora_B.copy_(b)
        self.register_buffer("start_A", self.lora_A.detach().clone())
        self.register_buffer("start_B", self.lora_B.detach().clone())
        self._original: Tensor | None = None
        if config.in_place:
            place = "meta" if base.weight.is_meta else "cpu"
            self._original = base.weight.detach().to(place, copy=True)
        self.change_base()

    def _principal(self, config: PiSSAConfig) -> tuple[Tensor, Tensor]:
        """Return A₀ = (Σ_r/s)^½ V_rᵀ and B₀ = U_r (Σ_r/s)^½."""
        weight = self.base.weight.detach().to(self.parameter_dtype)
        if config.svd_iterations is None:
            u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
        else:
            wide = min(2 * config.rank, *weight.shape)  # oversampled: what comes next is near
            u, sigma, v = torch.svd_lowrank(weight, wide, niter=config.svd_iterations)
            vt = v.T
        root = (sigma[: config.rank] / self.scale).sqrt()
        return root[:, None] * vt[: config.rank], u[:, : config.rank] * root

    def forward(self, x: Tensor) -> Tensor:
        """Apply W x + b + s·(B A − B₀ A₀) dropout(x). Shape: (..., I) → (..., O)."""
        if self._original is not None:
            return super().forward(x)
        a, b, _ = self.operands(x)
        return moved_product(
            self.base,
            x,
            (a, b),
            (self.start_A, self.start_B),
            scale=self.scale,
            dropout=self.drop_rate,
        ).y

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Return float64 (s·[B, −B₀], [A; A₀]): one LoRA of rank 2r on the original W."""
        a, b, start_a, start_b = (
            tensor.to(torch.float64)
            for tensor in (self.lora_A, self.lora_B, self.start_A, self.start_B)
        )
        return self.scale * torch.cat([b, -start_b], dim=1), torch.cat([a, start_a], dim=0)

    @property
    def pristine_weight(self) -> Tensor:
        """The backbone's own W, whether merged, in place or neither. Shape: (O, I)."""
        return super().pristine_weight if self._original is None else self._original

    @torch.no_grad()
    def change_base(self) -> None:
        """In place, write W − s·B₀ A₀ into the base, subtracted in float64 and rounded once."""
        if self._original is None:
            return
        start = self.start_B.to(torch.float64) @ self.start_A.to(torch.float64)
        weight = self._original.to(self.base.weight.device, torch.float64)
        write(self.base.weight, weight - self.scale * start)

    def after_load(self) -> None:
        """Make the residual that belongs to the loaded start."""
        self.change_base()

    def unmerge(self) -> None:
        """Restore the unmerged base bit for bit: W, or the residual in place."""
        super().unmerge()
        self.change_base()

    @torch.no_grad()
    def restore_base(self) -> None:
        """Write W back."""
        if self._original is not None:
            self.base.weight.copy_(self._original)
