"""What tuning on one task takes from others: the relative drop of tasks that no run trained."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from furina.reporting.read.scores import by_seed, mean_of_means, means_by_seed
from furina.reporting.read.suites import Results


@dataclass(frozen=True)
class General:
    """A task that no run trained, seen as a suite of its protocol and main metric."""

    suite: Results
    task: str

    @property
    def group(self) -> str:
        """Return the heading of its columns."""
        return f"{self.task}, {self.suite.protocol}"

    @property
    def base(self) -> float | None:
        """Return the base model's accuracy in %, None where it was not scored."""
        values = by_seed(self.suite, "base", self.task).values()
        return statistics.fmean(values) if values else None

    def drops(self, row: str) -> dict[int, float]:
        """Return 100·(base − tuned)/base by seed; empty where one of them is missing or 0."""
        base = self.base
        tuned = by_seed(self.suite, row, self.task) if base else {}
        return {seed: 100 * (base - value) / base for seed, value in tuned.items() if base}


def general_tasks(suite: Results) -> list[General]:
    """Return the tasks that were scored and that no run trained, of every protocol."""
    taught = suite.taught
    metrics: dict[tuple[str, str], str] = {}
    for run in suite.runs:
        for score in run.record.evaluations:
            if score.task not in taught:
                metrics.setdefault((score.task, score.protocol), score.metric)
    return [
        General(replace(suite, protocol=protocol, metric=metric), task)
        for (task, protocol), metric in sorted(metrics.items())
    ]


def mean_drop(generals: Sequence[General], row: str) -> float | None:
    """Return a row's mean relative drop over the tasks, in %; None unless it has all of them."""
    drops = [general.drops(row) for general in generals]
    return mean_of_means(drops) if all(drops) else None


def mean_drops(generals: Sequence[General], row: str) -> list[float]:
    """Return the same by seed, of the seeds that have all tasks."""
    return list(means_by_seed([general.drops(row) for general in generals]).values())
