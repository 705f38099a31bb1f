"""Run a model in another mode and leave every module's mode as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import nn

from furina.inject import is_adapted, state_of


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode; each module's own mode comes back at the end, errors included.

    What an adapter derives from its parameters alone is made once for all forwards inside, so
    parameters must not change there. `model.generate` does so for its own forwards; a server or a
    decoding loop does it once for all.
    """
    keeping = state_of(model).tracker.keeping() if is_adapted(model) else nullcontext()
    with keeping, _mode(model, training=False):
        yield


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into training mode; each module's own mode comes back, errors included."""
    with _mode(model, training=True):
        yield


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    others = [module for module in model.modules() if module.training != training]
    model.train(training)
    try:
        yield
    finally:
        for module in others:
            module.training = not training
