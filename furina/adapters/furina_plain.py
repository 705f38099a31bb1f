"""FURINA on the equations of `furina/reference.py`, with no other backward than autograd's.

For trying a change of the equations, which is made there and nowhere else, and for testing the fast
form. It forms k×d products for every expert, and each expert's output for every token: slow, and
large. The method is not listed by `furina methods`; its options are those of `furina`, and one seed
gives both the same adapter and the same dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from furina import reference
from furina.adapters.base import register
from furina.adapters.furina import FurinaConfig, FurinaLinear
from furina.adapters.mixture import Parts
from furina.kernels.dropout import draw_dropped, drop_
from furina.kernels.forward import ForwardTracker, Record
from furina.kernels.product import no_autocast


@register("furina_plain")
@dataclass(frozen=True)
class PlainFurinaConfig(FurinaConfig):
    """Options of FURINA."""

    summary: ClassVar[str] = "FURINA on its plain equations, to try a change of them"
    listed: ClassVar[bool] = False

    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> FurinaLinear:
        """Wrap one linear."""
        return PlainFurinaLinear(base, name, tracker, self)

    def statistics(
        self, records: Mapping[str, Record], mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Return each linear's T·(L_div + L_bal) of its T real tokens, (1,).

        Ranks add these, where the fast form adds up what the losses are made of.
        """
        if mask is not None and mask.is_meta:
            mask = None  # where a plan is made, no token is padding
        return {
            name: self._losses(activity if mask is None else activity[mask.squeeze(1)])
            for name, (activity,) in records.items()
        }

    def _losses(self, activity: Tensor) -> Tensor:
        if not len(activity):
            return activity.sum()[None]
        divergence, balance = reference.selection_loss(activity, self.top_k)
        return (len(activity) * (divergence + balance))[None]

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Return α·reduce(L_div + L_bal), a mean over the ranks' tokens."""
        return self.reduce(torch.cat(list(statistics.values())) / tokens)


class PlainFurinaLinear(FurinaLinear):
    """A FURINA linear that calls the reference for whatever it computes."""

    def _remember_start(self) -> None:
        """Keep the initial A, B and v, whose update the forward subtracts ("subtract" start)."""
        for name in ("lora_A", "lora_Bt", "magnitude"):
            self.register_buffer(f"start_{name}", getattr(self, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply W x + b + Δy(dropout(x)). Shape: (..., I) → (..., O)."""
        y: Tensor = self.base(x)
        x = self._dropped(x)
        self.record(x, lambda: self._selection(x))
        return y + self._update(x.to(self.lora_A.dtype)).to(y.dtype)

    def derive(self) -> None:
        """Return nothing: the reference takes A, B and v as they are."""
        return None

    def _dropped(self, x: Tensor) -> Tensor:
        """Drop the elements that the fast form would drop."""
        if not self.drop_rate:
            return x
        kept = torch.ones_like(x, memory_format=torch.contiguous_format)
        return x * drop_(kept, draw_dropped(x, self.drop_rate)) / (1 - self.drop_rate)

    def _experts(self, dtype: torch.dtype, start: str = "") -> tuple[Tensor, Tensor, Tensor]:
        """Return A (N, r, I), B (N, O, r) and v (O,) or (R, O), now or at the start."""
        a, bt = (getattr(self, f"{start}{name}").to(dtype) for name in ("lora_A", "lora_Bt"))
        v = getattr(self, f"{start}magnitude", bt.new_zeros(bt.shape[1])).to(dtype)
        a, b = (each.view(self.config.num_experts, self.config.rank, -1) for each in (a, bt))
        return a, b.mT, v * self.config.scale if self.config.scale_routed else v

    def _update(self, x: Tensor) -> Tensor:
        """Return Δy in x's dtype, less the initial one with "subtract"."""
        options: dict[str, Any] = {
            "num_shared": self.config.num_shared_experts,
            "scale": self.config.scale,
            "eps": self.config.eps,
            "detach_norm": self.config.detach_norm,
        }
        with no_autocast(x.device):
            update = reference.update(x, *self._experts(x.dtype), **options)
            if not self.subtracts:
                return update
            return update - reference.update(x, *self._experts(x.dtype, "start_"), **options)

    def _activity(self, x: Tensor) -> Tensor:
        """Return the routed experts' activity. Shape: (..., I) → (T, U, R)."""
        config, shared = self.config, self.config.num_shared_experts
        x = x.flatten(0, -2).to(self.lora_A.dtype)
        with no_autocast(x.device):
            a, b, _ = self._experts(x.dtype)
            unit = reference.direction(a[shared:], b[shared:], config.eps, config.detach_norm)
            return reference.activity(x, unit, config.activity, config.eps)

    def _selection(self, x: Tensor) -> Record:
        """Return the activity, without a gradient until v has moved, as `FurinaLinear` does."""
        activity = self._activity(x)
        return (torch.where((self.magnitude.detach() != 0).any(), activity, activity.detach()),)

    @torch.no_grad()
    def factors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Return (ΔW, 1): Δy is linear, so ΔW is what the identity's rows become."""
        identity = torch.eye(self.base.in_features, dtype=dtype, device=self.base.weight.device)
        return self._update(identity).T, identity

    @torch.no_grad()
    def activity(self, x: Tensor) -> Tensor:
        """Return the self-routed experts' shares. Shape: (T, I) → (T, 1, R) or (T, O, R)."""
        activity = self._activity(x)
        return activity / activity.sum(-1, keepdim=True)

    @torch.no_grad()
    def experts(self) -> tuple[Tensor, Tensor]:
        """Return the self-routed experts' directions Ŵ_i = diag(1/d̃_i) B_i · A_i."""
        a, b, _ = self._experts(torch.float64)
        shared = self.config.num_shared_experts
        norm = reference.row_norm(b @ a, self.config.eps)
        return (b / norm[..., None])[shared:], a[shared:]

    @torch.no_grad()
    def parts(self, x: Tensor) -> Parts | None:
        """Return s Σ B_j A_j x, and what the routed experts add to it."""
        shared = self.config.num_shared_experts
        if shared in (0, self.config.num_experts):
            return None
        x = x.to(self.lora_A.dtype)
        with no_autocast(x.device):
            a, b, _ = self._experts(x.dtype)
            update = reference.shared_update(x, a[:shared], b[:shared], self.config.scale)
        return Parts(update, self._update(x) - update)
