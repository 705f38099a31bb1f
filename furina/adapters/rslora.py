"""rsLoRA: LoRA scaled by α/√r (Kalajdzievski 2023, arXiv 2312.03732)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from furina.adapters.base import register
from furina.adapters.lora import LoRAConfig


@register("rslora")
@dataclass(frozen=True)
class RsLoRAConfig(LoRAConfig):
    """Options of rsLoRA."""

    summary: ClassVar[str] = "LoRA whose scale keeps its strength at any rank"
    source: ClassVar[str] = "Kalajdzievski 2023, arXiv 2312.03732"

    use_rslora: bool = True
    """Scale by α/√r; method lora is without it."""

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        self.require(self.use_rslora, "use_rslora", "true: method lora is without it")
