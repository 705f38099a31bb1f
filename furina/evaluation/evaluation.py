"""What scoring a model returns: scores, and everything they were made from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from furina.evaluation.samples import Sample, write_samples
from furina.evaluation.statistics import is_suspect, standard_error
from furina.records import Score, Variant

Engine = Literal["shared", "lm_eval"]


@dataclass(frozen=True)
class MetricScore:
    """One accuracy over `n` items, in [0, 1]; `suspect` if not clearly above chance."""

    metric: str
    value: float
    stderr: float
    n: int
    chance: float
    suspect: bool


@dataclass(frozen=True)
class FirstPrompt:
    """What the model was given first, as text and as token ids; `sha256` is that of `text`."""

    text: str
    ids: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Return the hash of the prompt's bytes."""
        return sha256(self.text)


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one set of items under one protocol.

    `scores` is by metric, the main one first. `engine` is "shared", "lm_eval" or "generate".
    `truncated` counts the prompts whose start was cut to fit the model.
    """

    task: str
    protocol: str
    protocol_version: str
    engine: str
    lm_eval_version: str
    batch_size: int
    scores: dict[str, MetricScore]
    samples: tuple[Sample, ...]
    first_prompt: FirstPrompt
    truncated: int

    def write_samples(self, path: Path) -> None:
        """Write the per-question outputs as gzipped JSON lines, atomically."""
        write_samples(path, self.samples)

    def to_records(self, variant: Variant, samples: str | None) -> tuple[Score, ...]:
        """Return one record per metric; `samples` is the written file, from the record's folder."""
        return tuple(
            Score(
                variant=variant,
                task=self.task,
                protocol=self.protocol,
                protocol_version=self.protocol_version,
                metric=score.metric,
                value=score.value,
                stderr=score.stderr,
                n=score.n,
                chance=score.chance,
                suspect=score.suspect,
                engine=self.engine,
                first_prompt_sha256=self.first_prompt.sha256,
                first_prompt_ids=self.first_prompt.ids,
                truncated=self.truncated,
                lm_eval=self.lm_eval_version,
                samples=samples,
            )
            for score in self.scores.values()
        )


def metric_score(metric: str, samples: Sequence[Sample], chance: float) -> MetricScore:
    """Return the share of samples that are right by `metric`, with its standard error."""
    correct = [sample.correct[metric] for sample in samples]
    value, stderr = sum(correct) / len(correct), standard_error(correct)
    return MetricScore(
        metric, value, stderr, len(samples), chance, is_suspect(value, stderr, chance)
    )


def lm_eval_version() -> str:
    """Return the version of lm-eval that is installed."""
    from importlib.metadata import version

    return version("lm-eval")


def sha256(text: str) -> str:
    """Return the hash of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
