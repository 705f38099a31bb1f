"""PiSSA: LoRA that starts at W's principal part (Meng et al. 2024, arXiv 2404.02948, eq. 2 to 4).

With W = U Σ Vᵀ and its r largest singular values, s·B₀ A₀ = U_r Σ_r V_rᵀ and

    y = W x + b + s (B A − B₀ A₀) x

W itself is untouched, so the start is the base to the bit and the update an ordinary LoRA of rank
2r. In place, as the paper has it, W − s·B₀ A₀ takes W's place: one product less, for a start that
equals the base to rounding only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from furina.adapters.base import register
from furina.adapters.lora import LoRAConfig, LoRALinear
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker
from furina.kernels.product import moved_product
from furina.kernels.sharding import is_sharded, write


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
        self.in_place = config.in_place
        self._original: Tensor | None = None
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
        if self.in_place:
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
    def merged_weight(self, delta: Tensor | None = None) -> Tensor:
        """Return W + ΔW. Raises ConfigurationError if the residual in place is not this W's."""
        if not self.merged:
            self._require_residual(self.base.weight, self.start_A, self.start_B)
        return super().merged_weight(delta)

    @torch.no_grad()
    def change_base(self) -> None:
        """In place, keep W and write W − s·B₀ A₀, subtracted in float64 and rounded once."""
        if not self.in_place:
            return
        place = "meta" if self.base.weight.is_meta else "cpu"
        self._original = self.base.weight.detach().to(place, copy=True)
        self._hook = self.base.register_load_state_dict_pre_hook(self._check_loaded)  # type: ignore[no-untyped-call]
        self.after_load()

    @torch.no_grad()
    def after_load(self) -> None:
        """Make the residual that belongs to the loaded start."""
        if self._original is not None:
            write(self.base.weight, self._residual(self.start_A, self.start_B))

    def unmerge(self) -> None:
        """Restore the unmerged base bit for bit: W, or the residual in place."""
        super().unmerge()
        self.after_load()

    @torch.no_grad()
    def restore_base(self) -> None:
        """Write W back. Raises ConfigurationError if the residual in place is not this W's."""
        if self._original is not None:
            self._require_residual(self.base.weight, self.start_A, self.start_B)
            self._hook.remove()
            self.base.weight.copy_(self._original)
            self._original = None

    def _residual(self, start_a: Tensor, start_b: Tensor) -> Tensor:
        assert self._original is not None
        device = self.base.weight.device
        w, b, a = (t.to(device, torch.float64) for t in (self._original, start_b, start_a))
        return w - self.scale * (b @ a)

    def _require_residual(self, weight: Tensor, start_a: Tensor, start_b: Tensor) -> None:
        """Raise ConfigurationError if `weight` is more than a rounding from W − s·B₀ A₀."""
        if self._original is None or weight.is_meta or is_sharded(weight):
            return
        residual = self._residual(start_a, start_b)
        rounding = torch.finfo(weight.dtype).eps * residual.abs().max()
        if (
            weight.shape != residual.shape
            or (weight.to(residual) - residual).abs().max() > rounding
        ):
            raise ConfigurationError(
                f"{self.name} has another backbone's weight in place of its own residual: load "
                "weights into the backbone before furina.adapt, and an adapter alone with "
                "furina.load_adapter_state_dict."
            )

    def _check_loaded(
        self, base: nn.Module, state: dict[str, Any], prefix: str, *_: object
    ) -> None:
        """Refuse, before it is loaded, a weight that does not belong to the W that is kept."""
        weight, outer = state.get(f"{prefix}weight"), prefix.removesuffix("base.")
        if weight is not None and not self.merged:
            starts = (("start_A", self.start_A), ("start_B", self.start_B))
            a, b = (state.get(f"{outer}{name}", own) for name, own in starts)
            self._require_residual(weight, a, b)
