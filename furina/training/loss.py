"""The task loss, next-token prediction of the answer alone, and the weights of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.errors import DataError
from furina.model.inference import logits_at

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
    Raises DataError if `input_ids` or `labels` is missing, their shapes differ, or an answer token
    stands where the attention mask is 0.
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
    if mask is not None and mask.shape == labels.shape:
        padded = int(((labels != IGNORED) & (mask == 0)).sum())
        if padded:
            raise DataError(
                f"{padded} labels of a training batch stand on padding, which would be trained as "
                f"answers: set them to {IGNORED}."
            )
    return AnswerBatch(
        inputs={key: value for key, value in batch.items() if key != "labels"},
        positions=rows * ids.shape[1] + columns,
        targets=labels[rows, columns + 1].long(),
        real_tokens=ids.numel() if mask is None else int((mask != 0).sum()),
    )


def answer_logits(
    model: nn.Module, batch: Mapping[str, Tensor] | AnswerBatch
) -> tuple[Tensor, Tensor]:
    """Return the logits that predict the n answer tokens, and those tokens; see `logits_at`.

    Shape: (n, V), (n,).
    """
    answers = batch if isinstance(batch, AnswerBatch) else select_answers(batch)
    logits = logits_at(model, answers.positions, **answers.inputs)
    return logits, answers.targets


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


class LossWeights(NamedTuple):
    """A micro-batch's weight in the two parts of the step's loss."""

    task: float
    """n_m / Σ n: its answer tokens on this rank, over those of the step on all ranks."""
    auxiliary: float
    """t_m / Σ t: real tokens of the m-th micro-batch of all ranks, over those of the step."""


def loss_weights(
    window: list[AnswerBatch], sum_over_ranks: Callable[[Tensor], Tensor] | None
) -> list[LossWeights]:
    """Return each micro-batch's weights, exchanging token counts with the other ranks if any.

    Raises DataError if no rank has an answer token, or if the ranks have different numbers of
    micro-batches, whose collectives would hang or mix.
    """
    answers = [len(micro.targets) for micro in window]
    counts = torch.tensor([*(micro.real_tokens for micro in window), sum(answers)])
    if sum_over_ranks is not None:
        _require_equal_windows(len(window), sum_over_ranks)
        counts = sum_over_ranks(counts)
    *tokens, total = counts.tolist()
    if total == 0:
        raise DataError("A training batch has no answer token: every label is -100.")
    return [LossWeights(n / total, t / sum(tokens)) for n, t in zip(answers, tokens, strict=True)]


def _require_equal_windows(size: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
    ranks, total, squares = sum_over_ranks(torch.tensor([1, size, size**2])).tolist()
    if total**2 != ranks * squares:
        raise DataError(
            "The ranks got different numbers of micro-batches for one step: choose a batch size "
            "that they can share equally."
        )
