"""A model in evaluation or training mode, and its logits where they count.

All logits of a large vocabulary would cost more than the rest. What `lm_head` is given is changed
by a hook, so that whatever the model does to its logits afterwards (scaling, soft-capping) stays in
place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.model.state import is_adapted, state_of


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


def logits_at(model: nn.Module, positions: Tensor, input_ids: Tensor, **inputs: Any) -> Tensor:
    """Run the whole model, with `lm_head` at n of the B·T flattened positions only.

    Shape: `positions` (n,), `input_ids` (B, T) → (n, V). Raises ConfigurationError if the model's
    output embedding is not applied to its (B, T, H) hidden states.
    """
    with _rows_of_lm_head(model, input_ids.shape, positions):
        output = model(input_ids=input_ids, **inputs, use_cache=False)
    logits: Tensor = output.logits
    if logits.shape[:-1] != (1, len(positions)):
        raise _not_by_lm_head(model)
    return logits[0]


@contextmanager
def _rows_of_lm_head(model: nn.Module, shape: torch.Size, positions: Tensor) -> Iterator[None]:
    """Let `lm_head` see the hidden states of these positions only, as one sequence (1, n, H)."""

    def gather(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        given = [*args, *kwargs.values()]
        if len(given) != 1 or given[0].shape[:-1] != shape:
            raise _not_by_lm_head(model)
        rows = given[0].flatten(0, 1).index_select(0, positions)[None]
        return ((rows,), {}) if args else ((), dict.fromkeys(kwargs, rows))

    handle = _lm_head(model).register_forward_pre_hook(gather, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def contiguous_lm_head_input(model: nn.Module) -> Iterator[None]:
    """Let `lm_head` see contiguous hidden states in here, whatever positions are sliced out.

    PyTorch multiplies a strided slice of several rows by a frozen weight row by row (`should_fold`
    of its matmul), on a CPU with a copy of the weight for each: with the large weight of `lm_head`
    and every row's last position this can take as long as the rest of the prompt.
    """

    def contiguous(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return tuple(each.contiguous() for each in args)

    handle = _lm_head(model).register_forward_pre_hook(contiguous)
    try:
        yield
    finally:
        handle.remove()


def _lm_head(model: nn.Module) -> nn.Module:
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    lm_head = get() if get is not None else None
    if lm_head is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no output embedding: use a causal language model."
        )
    return lm_head


def _not_by_lm_head(model: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"{type(model).__name__} does not compute its logits from one hidden state per token "
        "through get_output_embeddings(), so they cannot be restricted to the tokens that count."
    )
