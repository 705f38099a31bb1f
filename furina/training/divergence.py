"""Notice that a run has become NaN, without a device sync at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from furina.errors import FurinaError


class DivergedError(FurinaError):
    """The loss or its gradient is no longer finite."""

    def __init__(self, step: int) -> None:
        """Name the optimiser step, counted from 1."""
        super().__init__(
            f"Training diverged at step {step}: the loss or its gradient is infinite or NaN; "
            "lower the learning rate or lengthen the warm-up."
        )
        self.step = step


class DivergenceWatch:
    """Remember on the device which step was the first that was not finite."""

    def __init__(self) -> None:
        """Start with none."""
        self._first: Tensor | None = None

    def note(self, step: int, *values: Tensor) -> None:
        """Keep `step` if a value is not finite and no earlier step was; no device sync."""
        finite = torch.stack([torch.isfinite(value) for value in values]).all()
        bad = torch.where(finite, 0, step)
        self._first = bad if self._first is None else torch.where(self._first > 0, self._first, bad)

    def check(self) -> None:
        """Raise DivergedError naming that step, if there is one; waits for the device."""
        if self._first is not None and (step := int(self._first)):
            raise DivergedError(step)
