"""Training forwards through torch.compile: one graph for all layers, batch sizes and lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.model.state import state_of


class CompiledDecoder:
    """The decoder of an adapted causal LM, compiled as a whole; used inside `active()` only.

    The graph has no breaks, and takes batch size and length as they come: only a size of 1 has a
    graph of its own. `lm_head`, which sees another number of tokens each time, stays outside.
    Forwards outside `active()`, such as those of scoring, run as they are.
    """

    def __init__(self, model: nn.Module, backend: str = "inductor") -> None:
        """Prepare; it is compiled in the first forward.

        Raises ConfigurationError if there is no such backend, no decoder, or checkpointing.
        """
        require_backend(backend)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            raise ConfigurationError(
                "torch.compile decides itself what to recompute: turn gradient checkpointing off."
            )
        get: Callable[[], nn.Module] | None = getattr(model, "get_decoder", None)
        if get is None or get() is model:
            raise ConfigurationError(f"{type(model).__name__} has no decoder that can be compiled.")
        self._decoder = get()
        self._tracker = state_of(model).tracker
        self._run = torch.compile(self._decoder.forward, fullgraph=True, backend=backend)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let the model's forwards inside run compiled."""
        own = self._decoder.__dict__.get("forward")  # somebody may have put one on the instance
        self._decoder.forward = self._forward
        try:
            yield
        finally:
            del self._decoder.forward
            if own is not None:
                self._decoder.forward = own

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._tracker.active
        mask = None if forward is None else forward.mask
        for value in (*args, *kwargs.values(), mask):
            if isinstance(value, Tensor):
                _mark_sizes(value)
        return self._run(*args, **kwargs)


def require_backend(name: str) -> None:
    """Raise ConfigurationError unless torch.compile knows a backend of that name."""
    if name not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise ConfigurationError(f"compile={name!r}: torch.compile knows {usual}, and no such one.")


def _mark_sizes(tensor: Tensor) -> None:
    """Declare batch size and length dynamic, so that the first graph fits all."""
    for dimension, size in enumerate(tensor.shape[:2]):
        if size > 1:
            torch._dynamo.mark_dynamic(tensor, dimension)
