"""The result of scoring a model: scores, and everything they were made from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from furina.data.items import Item, chance_level
from furina.data.protocols import Protocol
from furina.data.tasks import Task
from furina.errors import DataError
from furina.evaluation.samples import Sample, write_samples
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
    """The first prompt, as text and as token ids."""

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

    @classmethod
    def of(
        cls,
        task: Task,
        protocol: Protocol,
        items: Sequence[Item],
        samples: Sequence[Sample],
        *,
        engine: str,
        batch_size: int,
        first_prompt: FirstPrompt,
        truncated: int,
        protocol_version: str | None = None,
    ) -> Evaluation:
        """Score the samples of `items` by each of their metrics."""
        chance = chance_level(items)
        return cls(
            task=task.name,
            protocol=protocol.name,
            protocol_version=protocol_version or str(protocol.version),
            engine=engine,
            lm_eval_version=version("lm-eval"),
            batch_size=batch_size,
            scores={metric: metric_score(metric, samples, chance) for metric in samples[0].correct},
            samples=tuple(samples),
            first_prompt=first_prompt,
            truncated=truncated,
        )

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
                **asdict(score),
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


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, sample deviation / sqrt(n), as lm-eval does.

    Raises DataError for fewer than two values, which have none.
    """
    n = len(values)
    if n < 2:
        raise DataError(f"A standard error needs at least 2 questions, not {n}: score more.")
    mean = sum(values) / n
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)


def is_suspect(value: float, stderr: float, chance: float) -> bool:
    """Return whether a score is not above chance by more than two standard errors."""
    return value <= chance + 2 * stderr


def sha256(text: str) -> str:
    """Return the hash of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
