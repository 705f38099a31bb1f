"""When two engines that round differently must agree, and how far they do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CANDIDATES = 10
"""The likeliest tokens whose logits' errors count: another one cannot become the likeliest."""
LISTED = 50
"""Disagreements that a report lists, those of the largest gaps."""


class Reference(NamedTuple):
    """What our model says of the next token at every position, as tensors (T,).

    `top` and `logprob` are the likeliest token and the log-probability of the real one, exactly;
    `rounded_top` and `rounded_logprob` the same in the dtype that is checked. `gap` is the exact
    lead of the first logit over the second, `error` what rounding does to leads.
    """

    top: Tensor
    gap: Tensor
    error: Tensor
    logprob: Tensor
    rounded_top: Tensor
    rounded_logprob: Tensor


def refer(exact: Tensor, rounded: Tensor, following: Tensor) -> Reference:
    """Return the reference from logits (T, V) of two precisions and the real next tokens (T,).

    The error at a position is max_c |(l'(t) − l'(c)) − (l(t) − l(c))| over the `CANDIDATES`
    likeliest tokens c, where t is the likeliest, l the exact logits and l' the rounded ones.
    """
    leaders = exact.topk(min(CANDIDATES, exact.shape[-1]))
    others = rounded.gather(-1, leaders.indices)
    leads = leaders.values[:, :1] - leaders.values
    error = (others[:, :1] - others - leads).abs().amax(1)
    real = following[:, None]
    return Reference(
        top=leaders.indices[:, 0],
        gap=leads[:, 1],
        error=error,
        logprob=exact.log_softmax(-1).gather(-1, real)[:, 0],
        rounded_top=rounded.argmax(-1),
        rounded_logprob=rounded.log_softmax(-1).gather(-1, real)[:, 0],
    )


def verdict(ours: Reference, top: Tensor, logprob: Tensor, width: int) -> dict[str, Any]:
    """Hold an engine's likeliest tokens and log-probabilities (T,) against ours.

    T is that of rows of `width` positions one after the other.

    The rule: where our exact gap is larger than the largest `error` of any position, which is one
    number for all of them and measured on our own model alone, the tokens must be equal. Such a
    position is decided; a disagreement there is an exception. Below it rounding may choose.
    """
    allowed = ours.error.max().item()
    decided, wrong = ours.gap > allowed, top != ours.top
    listed = (wrong.nonzero()[:, 0]).tolist()
    listed.sort(key=lambda index: -ours.gap[index].item())
    return {
        "positions": len(top),
        "allowed": allowed,
        "error_median": ours.error.median().item(),
        "decided": int(decided.sum()),
        "exceptions": int((decided & wrong).sum()),
        "disagree": int(wrong.sum()),
        "disagree_rounded": int((ours.rounded_top != ours.top).sum()),
        "largest_gap": ours.gap[wrong].max().item() if wrong.any() else None,
        "logprob_error": errors(logprob - ours.logprob),
        "logprob_error_rounded": errors(ours.rounded_logprob - ours.logprob),
        "disagreements": [_told(ours, top, index, width) for index in listed[:LISTED]],
    }


def _told(ours: Reference, top: Tensor, index: int, width: int) -> dict[str, Any]:
    row, position = divmod(index, width)
    return {
        "row": row,
        "position": position,
        "gap": ours.gap[index].item(),
        "ours": int(ours.top[index]),
        "ours_rounded": int(ours.rounded_top[index]),
        "theirs": int(top[index]),
    }


def errors(differences: Tensor) -> dict[str, float]:
    """Return median and maximum of the differences' sizes."""
    sizes = differences.abs()
    return {"median": sizes.median().item(), "max": sizes.max().item()}


def changed(base: Reference, other: Reference) -> dict[str, int]:
    """Count the positions where the exact likeliest token is another one, also decided ones."""
    differs = base.top != other.top
    decided = other.gap > other.error.max()
    return {"positions": int(differs.sum()), "decided": int((differs & decided).sum())}


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences share from the start."""
    pairs = zip(one, other, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(one))


def agreement(ones: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return the share of equal sequences and the mean length of their common prefixes."""
    shared = [common_prefix(one, other) for one, other in zip(ones, others, strict=True)]
    equal = sum(n == len(one) for n, one in zip(shared, ones, strict=True))
    return {"equal": equal / len(ones), "prefix": statistics.mean(shared), "n": len(ones)}


def told(scores: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return an engine's likeliest tokens and log-probabilities of all rows, each (T,)."""
    top = torch.tensor([token for row in scores for token in row["top"]])
    logprob = [value for row in scores for value in row["logprob"]]
    return top, torch.tensor(logprob, dtype=torch.float64)
