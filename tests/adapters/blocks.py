"""A feed-forward block that is float64 throughout, where a Llama's norms are fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterConfig
from furina.model.state import state_of


class FFN(nn.Module):
    """A gated feed-forward block of unequal sides."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(11, 7, bias=False), nn.Linear(11, 7, bias=False)
        self.down_proj, self.act = nn.Linear(7, 11, bias=False), act

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return found


def mixed_ffn(config: AdapterConfig, act: Callable[[Tensor], Tensor] = nn.functional.silu) -> FFN:
    """Return an adapted block whose every trained entry has moved."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = FFN(act).double()
    model = furina.adapt(block, config, targets=["gate_proj", "up_proj", "down_proj"], seed=0)
    for layer in state_of(model).layers.values():
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for p in layer.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += 0.5 * noise
    return model
