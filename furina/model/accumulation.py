"""What depends on the parameters alone, made once for all micro-batches of an optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.model.state import state_of


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Let the forwards inside share norms, directions and the like; call backward inside, too.

    What is shared is cut off from how it was made: gradients gather there and reach the parameters
    when the block ends, equal to those of separate forwards up to rounding. Parameters must not
    change inside. Not for DDP or FSDP2, whose hooks on parameters exchange gradients before that.
    """
    state = state_of(model)
    is_open = True

    def refuse_if_closed(gradient: Tensor) -> None:
        if not is_open:
            raise ConfigurationError(
                "backward() ran after the furina.accumulating block had ended, which passes the "
                "gradients on: call it inside the block."
            )

    def leaf(tensor: Tensor) -> Tensor:
        if tensor.grad_fn is None:  # a parameter or a constant
            return tensor
        new = tensor.detach().requires_grad_()
        new.register_hook(refuse_if_closed)  # type: ignore[no-untyped-call]
        return new

    # Now and not in the first forward, where gradient checkpointing would make them again.
    with torch.enable_grad():
        derived = {name: layer.derive() for name, layer in state.layers.items()}
    made = {name: each for name, each in derived.items() if each is not None}
    shared = {name: each.map(leaf) for name, each in made.items()}
    state.tracker.shared = shared
    try:
        yield
        pairs = [
            (tensor, new.grad)
            for name, each in made.items()
            for tensor, new in zip(each.tensors(), shared[name].tensors(), strict=True)
            if new is not tensor and new.grad is not None
        ]
        if pairs:
            tensors, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(tensors, gradients)
    finally:
        state.tracker.shared = None
        is_open = False
