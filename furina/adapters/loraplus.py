"""LoRA+: LoRA whose B learns faster than A (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from furina.adapters.base import register
from furina.adapters.lora import LoRAConfig


@register("loraplus")
@dataclass(frozen=True)
class LoRAPlusConfig(LoRAConfig):
    """Options of LoRA+."""

    summary: ClassVar[str] = "LoRA with a higher learning rate for B"
    source: ClassVar[str] = "Hayou et al. 2024, arXiv 2402.12354"
    deviations: ClassVar[str] = (
        "Groups go by parameter, not by dimension: no vector joins B's group unasked. Any other "
        "method gets the same ratio by the run option lora_plus_ratio."
    )

    ratio: float = 16.0
    """Learning rate of B over that of A."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.ratio > 0, "ratio", "positive")

    def learning_rate_multipliers(self) -> dict[str, float]:
        """Give B its own learning rate."""
        return {"lora_B": self.ratio}
