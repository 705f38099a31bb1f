"""One run = one JSON file: what was run, where, on what, and everything that was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from furina.records import codec
from furina.records.environment import Provenance

SCHEMA = 2

Status = Literal["success", "diverged", "failed"]
Variant = Literal["base", "unmerged", "merged", "router_removed"]


@dataclass(frozen=True)
class Backbone:
    """The frozen model: its name and the sha256 of all its weights."""

    name: str
    sha256: str


@dataclass(frozen=True)
class Data:
    """A task's rows: where they came from, their hashes, and the named test subset.

    What was not trained on has no train hash, what was not scored no test hash.
    """

    task: str
    source: str
    train_sha256: str | None
    validation_sha256: str | None
    test_sha256: str | None
    test_subset: str | None


@dataclass(frozen=True)
class Training:
    """Cost and course of one fine-tuning; `trainable_without_router` equals `trainable` if none.

    `seconds` excludes evaluation and the writing of checkpoints. `final_loss` is null when the
    loss was not finite. `loss_curve` and `validation_curve` hold (optimiser step, loss), and
    `auxiliary_curve` the auxiliary part of the former, where there is one. `gradient_ratio` is
    |grad of the auxiliary loss| / |grad of the task loss| on the routed parameters. `selection`
    holds named means over the adapted linears, such as top_k_share.
    """

    steps: int
    seconds: float
    peak_memory_bytes: int
    trainable: int
    trainable_without_router: int
    total: int
    final_loss: float | None
    loss_curve: tuple[tuple[int, float], ...]
    validation_curve: tuple[tuple[int, float], ...] = ()
    gradient_ratio: float | None = None
    selection: dict[str, float] | None = None
    auxiliary_curve: tuple[tuple[int, float], ...] = codec.later(())


@dataclass(frozen=True)
class Score:
    """One metric of one variant of the model on one task's test subset, under one protocol.

    `value`, `stderr` and `chance` are fractions in [0, 1]. `suspect` marks a value that is not
    more than two standard errors above chance. `engine` says what computed it: furina's scoring of
    shared prefixes, lm-eval's HFLM, or generation. `first_prompt_ids` are the tokens of the first
    prompt, BOS included if there is one. `samples` is the file of per-question outputs (gzipped
    JSON lines), relative to the record's folder.
    """

    variant: Variant
    task: str
    protocol: str
    protocol_version: str
    metric: str
    value: float
    stderr: float
    n: int
    chance: float
    suspect: bool
    engine: str
    first_prompt_sha256: str
    first_prompt_ids: tuple[int, ...]
    truncated: int
    lm_eval: str
    samples: str | None


@dataclass(frozen=True)
class Merge:
    """How far the merged model is from the unmerged one.

    `max_abs_delta` and `relative_delta` describe the merged update (largest entry; norm over
    the weights' norm); the logits' differences are merged minus unmerged.
    """

    num_merged: int
    max_abs_delta: float
    relative_delta: float
    logits_max_difference: float | None
    logits_rms_difference: float | None
    answers_changed: int | None


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` repeats, in milliseconds."""

    median: float
    q1: float
    q3: float
    n: int


@dataclass(frozen=True)
class Latency:
    """Generation times of one variant, for fixed numbers of prompt and new tokens, batch 1."""

    variant: Variant
    prompt_tokens: int
    new_tokens: int
    ttft_ms: Spread
    per_token_ms: Spread
    total_ms: Spread


@dataclass(frozen=True)
class RunRecord(codec.Record):
    """Everything known about one (row, task, seed) of a suite.

    `started` and `finished` are UTC, ISO 8601. A run that failed or diverged keeps its record,
    with the reason in `error`.
    """

    suite: str
    name: str
    method: str
    task: str
    seed: int
    config: dict[str, object]
    command: str
    started: str
    finished: str
    provenance: Provenance
    backbone: Backbone
    data: tuple[Data, ...]
    training: Training | None
    evaluations: tuple[Score, ...]
    merge: Merge | None
    latency: tuple[Latency, ...]
    status: Status = "success"
    error: str | None = None
    schema: int = SCHEMA

    @property
    def row(self) -> str:
        """Return what its row in the suite's table is called: the method, unless the suite says."""
        return str(self.config.get("row") or self.method)

    @property
    def file_name(self) -> str:
        """Return the record's file name inside its suite's folder."""
        return f"{self.row}--{self.task}--seed{self.seed}.json"
