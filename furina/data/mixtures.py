"""Several tasks trained together: how often the rows of each are seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from furina.data.splits import chosen
from furina.errors import ConfigurationError, nearest
from furina.options.hints import is_of, scalars

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """A task's part of a mixture.

    Attributes:
        weight: how often an epoch holds each row; 0.5 for a seeded half of the rows.
        cap: rows that are used at all, a seeded choice; all if none.
        task_type: LoRAMoE's type of the task's sequences, 0 or 1.

    Raises:
        ConfigurationError: a value that leaves no rows, or another type.
    """

    weight: float = 1.0
    cap: int | None = None
    task_type: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be sampled."""
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ConfigurationError(f"weight={self.weight} of a mixture's task must be positive.")
        if self.cap is not None and self.cap < 1:
            raise ConfigurationError(f"cap={self.cap} of a mixture's task must be at least 1.")
        if self.task_type not in (0, 1):
            raise ConfigurationError(f"task_type={self.task_type} of a mixture must be 0 or 1.")


def read_shares(mixture: Mapping[str, Any]) -> dict[str, Share]:
    """Read a mapping from task names to options of `Share` (or nothing, for the defaults).

    Raises ConfigurationError for an unknown option or a value of the wrong type.
    """
    known = scalars(Share)
    shares = {}
    for task, options in mixture.items():
        if not isinstance(options, Mapping | None):
            raise ConfigurationError(
                f"mixture: {task} must hold options such as weight and cap, not {options!r}."
            )
        for name, value in (options or {}).items():
            if name not in known:
                raise ConfigurationError(
                    f"mixture: {task} has an unknown option {name!r}.{nearest(str(name), known)}"
                )
            if not is_of(value, known[name]):
                raise ConfigurationError(f"mixture: {task} has {name}={value!r}: give a number.")
        shares[task] = Share(**(options or {}))
    return shares


def take(rows: Sequence[T], cap: int | None, seed: int, name: str) -> list[T]:
    """Return `cap` rows in their order, chosen by seed and name; all without a cap."""
    if cap is None or cap >= len(rows):
        return list(rows)
    return [rows[i] for i in chosen([f"{name}\n{i}" for i in range(len(rows))], cap, seed)]


def repeat(rows: Sequence[T], weight: float, seed: int, name: str) -> list[T]:
    """Return the rows `weight` times: all of them ⌊weight⌋ times and a seeded part of the rest."""
    whole, part = divmod(weight, 1)
    count = round(part * len(rows))
    return list(rows) * int(whole) + (take(rows, count, seed, name) if count else [])
