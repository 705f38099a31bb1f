"""The task loss: next-token prediction of the answer, and of nothing else.

Only the hidden states that predict an answer token go through `lm_head`: with a vocabulary of 49 k
and a dozen answer tokens per prompt of a hundred, the full logits would cost more than the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.errors import ConfigurationError, DataError

IGNORED = -100
"""The label of a token that is not part of an answer."""


class AnswerBatch(NamedTuple):
    """A micro-batch whose answer tokens are located; made on the CPU, it needs no device sync."""

    inputs: dict[str, Tensor]
    """What the model is called with: `input_ids` (B, T), `attention_mask` (B, T), …"""
    positions: Tensor
    """Indices into the B·T flattened positions that predict an answer token. Shape: (n,)."""
    targets: Tensor
    """The answer tokens. Shape: (n,)."""
    real_tokens: int
    """Tokens that are not padding; all of them without an attention mask."""


def select_answers(batch: Mapping[str, Tensor]) -> AnswerBatch:
    """Split a micro-batch into the model's inputs and its answer tokens (`labels` other than -100).

    Shape: `input_ids`, `labels` and `attention_mask` are (B, T).
    Raises DataError if `input_ids` or `labels` is missing or their shapes differ.
    """
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise DataError(
                f"A training batch has no {key!r}, only {', '.join(batch) or 'nothing'}."
            )
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.dim() != 2 or ids.shape != labels.shape:
        raise DataError(
            f"input_ids {tuple(ids.shape)} and labels {tuple(labels.shape)} of a training batch "
            "must both be (batch, sequence)."
        )
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
    mask = batch.get("attention_mask")
    return AnswerBatch(
        inputs={key: value for key, value in batch.items() if key != "labels"},
        positions=rows * ids.shape[1] + columns,
        targets=labels[rows, columns + 1],
        real_tokens=ids.numel() if mask is None else int((mask != 0).sum()),
    )


def answer_logits(
    model: nn.Module, batch: Mapping[str, Tensor] | AnswerBatch
) -> tuple[Tensor, Tensor]:
    """Run the whole model, with `lm_head` at the n answer positions only.

    Returns the logits and their targets. Whatever the model does to its logits afterwards
    (scaling, soft-capping) stays in place.
    Shape: (n, V), (n,). Raises ConfigurationError if the model's output embedding is not applied
    to its (B, T, H) hidden states.
    """
    answers = batch if isinstance(batch, AnswerBatch) else select_answers(batch)
    with _rows_of_lm_head(model, answers):
        output = model(**answers.inputs, use_cache=False)
    logits: Tensor = output.logits
    if logits.shape[:-1] != (1, len(answers.targets)):
        raise ConfigurationError(
            f"{type(model).__name__} does not compute its logits through get_output_embeddings(), "
            "so the loss cannot be restricted to the answer."
        )
    return logits[0], answers.targets


def answer_loss(model: nn.Module, batch: Mapping[str, Tensor] | AnswerBatch) -> tuple[Tensor, int]:
    """Return the mean negative log-likelihood of the answer tokens and their number n.

    In fp32 at least, whatever the model's dtype; 0 with a graph when there is no answer token.
    """
    logits, targets = answer_logits(model, batch)
    return mean_nll(logits, targets), len(targets)


def mean_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of −log p(target), 0 for none. Shape: (n, V), (n,) → ()."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(wide, targets, reduction="sum") / max(len(targets), 1)


@contextmanager
def _rows_of_lm_head(model: nn.Module, answers: AnswerBatch) -> Iterator[None]:
    """Let `lm_head` see the answer positions only, as one sequence (1, n, H)."""
    lm_head = _lm_head(model)
    expected = answers.inputs["input_ids"].shape

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        (hidden,) = args
        if hidden.shape[:-1] != expected:
            raise ConfigurationError(
                f"lm_head got hidden states of shape {tuple(hidden.shape)} for input ids of shape "
                f"{tuple(expected)}: the loss needs one hidden state per token."
            )
        return (hidden.flatten(0, 1).index_select(0, answers.positions)[None],)

    handle = lm_head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


def _lm_head(model: nn.Module) -> nn.Module:
    get: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    lm_head = get() if get is not None else None
    if lm_head is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no output embedding: train a causal language model."
        )
    return lm_head
