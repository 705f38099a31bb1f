"""What every mixture can tell of its experts, whoever weighs them: a router, or nobody.

The analysis of activity (`furina.analysis`) asks for nothing else, so it knows no method by name.

Shape legend: T tokens, I = d in_features, O = k out_features, N experts, r rank of one expert, U
output units that weigh the experts apart: 1 where a token does so as a whole.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

from torch import Tensor

from furina.adapters.base import AdapterLinear

MOST_ACTIVE = 2
"""K where a method lets no fixed number of experts act on a token: the paper's."""


class Parts(NamedTuple):
    """What the experts add to W x, (T, O) each."""

    shared: Tensor
    """By the experts that act on every token."""
    routed: Tensor
    """By those that the token weighs."""


class MixtureLinear(AdapterLinear):
    """A linear whose update is made of experts."""

    @property
    @abstractmethod
    def refusal(self) -> str | None:
        """Why a token does not choose among experts here, None if it does."""

    @property
    @abstractmethod
    def most_active(self) -> int:
        """The number K of experts that act on a token, or are called its most active ones."""

    @abstractmethod
    def activity(self, x: Tensor) -> Tensor:
        """Return each expert's share of a token's activity, at least fp32, without dropout.

        A router's probabilities before any selection; asked only where there is no `refusal`. The
        shares of a token (and unit) sum to 1. Shape: (T, I) → (T, U, N).
        """

    @abstractmethod
    def experts(self) -> tuple[Tensor, Tensor]:
        """Return float64 (B, A) of the experts with an update of their own, up to its scale.

        Shape: (N, O, r), (N, r, I).
        """

    def parts(self, x: Tensor) -> Parts | None:
        """Return the update by shared and by routed experts, without dropout; None without both.

        Shape: (T, I) → (T, O) twice.
        """
        return None
