"""MoLoRA: dense soft routing over LoRA experts (Zadouri et al. 2023, arXiv 2309.05444).

    y = W x + b + s Σ_e softmax(R x)_e B_e A_e x

All experts act on every token, weighed by the router; there is no auxiliary loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from furina.adapters.base import register
from furina.adapters.routing import DenseConfig


@register("molora")
@dataclass(frozen=True)
class MoLoRAConfig(DenseConfig):
    """Options of MoLoRA."""

    summary: ClassVar[str] = "LoRA experts, all weighed by a softmax router per linear"
    source: ClassVar[str] = "Zadouri et al. 2023, arXiv 2309.05444"
    parameter_formula: ClassVar[str] = "N·r(d+k)+N·d"
    deviations: ClassVar[str] = (
        "Published for T5 with r 4, N 10, α 16 and no dropout; this is its form for causal models. "
        "A is drawn as in LoRA, not from N(0, 0.02²)."
    )
    router_start: ClassVar[Literal["kaiming", "normal"]] = "normal"
