"""How far two scorings are apart, and what a report says of its own run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import lm_eval
import torch
import transformers

from benchmarks.common.command import Report

GAP = 1e-3
"""How far log-likelihoods in fp32 may be apart, and two answers that may change places."""


def lead(loglikelihoods: Sequence[float]) -> float:
    """Return the distance between the two best answers."""
    best, second = sorted(loglikelihoods, reverse=True)[:2]
    return best - second


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest difference between two scorings of a question."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def told(options: Namespace) -> Report:
    """Return the settings and the versions of a run."""
    modules = (torch, transformers, lm_eval)
    versions = {module.__name__: module.__version__ for module in modules}
    return {"settings": vars(options), "versions": versions}
