"""Run a model in another mode and leave every module's mode as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode; each module's own mode comes back at the end, errors included."""
    with _mode(model, training=False):
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
