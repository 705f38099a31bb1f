"""Records of the two small studies: the learning-rate search and the selection loss on and off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from furina.records import codec
from furina.records.environment import Provenance

STUDY_SCHEMA = 3


@dataclass(frozen=True)
class SearchRecord(codec.Record):
    """One trial of the search, scored on rows held out of *train*.

    `value` and `stderr` are fractions, null when the trial diverged.
    `magnitude_multiplier` is null for methods without a magnitude.
    """

    method: str
    task: str
    protocol: str
    learning_rate: float
    magnitude_multiplier: float | None
    steps: int
    seed: int
    metric: str
    value: float | None
    stderr: float | None
    n: int
    seconds: float
    config: dict[str, object]
    command: str
    provenance: Provenance
    split: Literal["train-held-out"] = "train-held-out"
    schema: int = STUDY_SCHEMA

    @property
    def file_name(self) -> str:
        """Return a name that holds every searched value, so that no two trials share a file."""
        multiplier = "" if self.magnitude_multiplier is None else f"x{self.magnitude_multiplier:g}"
        return (
            f"{self.method}--{self.task}--{self.protocol}--lr{self.learning_rate:g}{multiplier}"
            f"--steps{self.steps}--seed{self.seed}.json"
        )


@dataclass(frozen=True)
class SelectionRecord(codec.Record):
    """One seed of the study of the expert selection loss; coefficient 0 is the loss-off run.

    `top_k_share` is the share of the K most active experts in the activity of all routed ones
    on held-out tokens, as a mean over the adapted linears. `reduction` says how the loss is
    reduced over linears. `gradient_ratio` is null when the loss is off and was not measured.
    """

    method: str
    task: str
    seed: int
    coefficient: float
    reduction: Literal["mean", "sum"]
    top_k: int
    steps: int
    top_k_share: float
    final_loss: float
    gradient_ratio: float | None
    config: dict[str, object]
    command: str
    provenance: Provenance
    schema: int = STUDY_SCHEMA

    @property
    def file_name(self) -> str:
        """Return a name that holds every varied value, so that no two runs share a file."""
        return (
            f"{self.method}--{self.task}--{self.reduction}--coefficient{self.coefficient:g}"
            f"--seed{self.seed}.json"
        )
