"""What depends on the parameters alone, made once for all micro-batches of an optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from furina.kernels.forward import SharedOperands
from furina.model.state import state_of


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Let the forwards inside share norms, directions and the like; call backward inside, too.

    Gradients gather at what is shared and reach the parameters when the block ends, equal to those
    of separate forwards up to rounding. Parameters must not change inside. Not for DDP or FSDP2,
    whose hooks on parameters exchange gradients before that.
    """
    state = state_of(model)
    tracker = state.tracker
    # Now and not in the first forward, where gradient checkpointing would make them again.
    with torch.enable_grad():
        made = {name: layer.derive() for name, layer in state.layers.items()}
    shared = SharedOperands({name: each for name, each in made.items() if each is not None})
    tracker.shared = shared
    try:
        yield
        shared.backward()
    finally:
        tracker.shared = None
        shared.close()
