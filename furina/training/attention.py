"""The attention implementation that trains fastest by benchmarks/training/attention.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

logger = logging.getLogger("furina")

EAGER_UP_TO = 256
"""Mean row length in tokens up to which, on a CPU, eager attention trains faster than sdpa."""


@contextmanager
def training_attention(model: nn.Module, row_length: float) -> Iterator[None]:
    """Use the attention inside that trains fastest on rows of `row_length` tokens on average.

    On a CPU the backward of sdpa is slower than that of eager attention for short rows, though its
    forward is not: outside, the model keeps its own. Nothing changes on other devices, or in a
    model whose attention cannot be changed.
    """
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if own != "sdpa" or not on_cpu or row_length > EAGER_UP_TO:
        yield
        return
    logger.info("Training with eager attention: rows have %.0f tokens on average.", row_length)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(own)  # type: ignore[operator]
