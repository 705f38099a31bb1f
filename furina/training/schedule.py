"""The learning rate and the random seed as functions of the optimiser step."""

from __future__ import annotations

import math
from typing import Literal, get_args

import lightning.pytorch as pl

from furina.errors import ConfigurationError, nearest

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate_factor(
    schedule: Schedule, step: int, total_steps: int, warmup_steps: int = 0
) -> float:
    """Return the factor on the learning rate of the optimiser step that follows `step` others.

    It rises linearly from 1/warmup_steps to 1, then stays there ("constant") or falls to 0 at
    `total_steps` along a line or half a cosine. Raises ConfigurationError for another schedule.
    """
    if schedule not in get_args(Schedule):
        raise ConfigurationError(
            f"Unknown schedule {schedule!r}.{nearest(schedule, get_args(Schedule))}"
        )
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    remaining = max(total_steps - step, 0) / max(total_steps - warmup_steps, 1)
    return remaining if schedule == "linear" else (1 - math.cos(math.pi * remaining)) / 2


def schedule_length(schedule: Schedule, total_steps: int | None, trainer: pl.Trainer) -> int:
    """Return `total_steps` or the Trainer's own number of steps; 0 for "constant".

    Raises ConfigurationError if neither is known, or if the rate would be 0 before the end.
    """
    if schedule == "constant":
        return 0
    planned = trainer.estimated_stepping_batches
    if total_steps is None and planned == float("inf"):
        raise ConfigurationError(
            f"The {schedule} schedule needs an end: set Trainer(max_steps=…) or total_steps."
        )
    if total_steps is not None and total_steps < planned:
        raise ConfigurationError(
            f"total_steps={total_steps} ends the {schedule} schedule before the Trainer's "
            f"{planned} steps, which would go on with a learning rate of 0."
        )
    return int(planned) if total_steps is None else total_steps


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of one optimiser step on one rank, so that dropout needs no saved state."""
    return ((seed * 1_000_003 + step) * 1_000_003 + rank) % 2**63
