"""How much each micro-batch of an optimiser step counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from furina.errors import DataError
from furina.training.loss import AnswerBatch


class Share(NamedTuple):
    """A micro-batch's weight in the two parts of the step's loss."""

    task: float
    """n_m / Σ n: its answer tokens on this rank, over those of the step on all ranks."""
    auxiliary: float
    """t_m / Σ t: real tokens of the m-th micro-batch of all ranks, over those of the step."""


def shares(
    window: list[AnswerBatch], sum_over_ranks: Callable[[Tensor], Tensor] | None
) -> list[Share]:
    """Return each micro-batch's share, exchanging token counts with the other ranks if there are.

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
    return [Share(n / total, t / sum(tokens)) for n, t in zip(answers, tokens, strict=True)]


def _require_equal_windows(size: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
    ranks, total, squares = sum_over_ranks(torch.tensor([1, size, size**2])).tolist()
    if total**2 != ranks * squares:
        raise DataError(
            "The ranks got different numbers of micro-batches for one step: choose a batch size "
            "that they can share equally."
        )
