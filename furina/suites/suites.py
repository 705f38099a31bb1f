"""A suite: the runs that belong in one table, and how to choose some of them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from furina.errors import ConfigurationError, nearest
from furina.experiment.config import RunConfig

Study = Literal["cells", "search", "selection"]
Scale = Literal["cpu", "paper"]
EXPERIMENTS = Path("experiments")
SHIPPED = Path(__file__).parents[2] / EXPERIMENTS
"""The suites of the checkout that this package is part of; an installed wheel has none."""


@dataclass(frozen=True)
class Suite:
    """Runs that belong in one table.

    `study` is "cells" (fine-tune, score, merge, time), "search" (score on held-out train questions)
    or "selection" (expert selection on held-out train questions). `scale` is None for a suite that
    has only one. `full` is whether all test questions are scored.
    """

    path: Path
    study: Study
    runs: tuple[RunConfig, ...] = field(repr=False)
    scale: Scale | None = None
    full: bool = False

    @property
    def name(self) -> str:
        """Return the folder's name, with the scale if it has any."""
        return named(self.path, self.scale) + "-full" * self.full

    @property
    def folder(self) -> str:
        """Return the folder of a study's records; those of cells are in their suite's."""
        return named(Path(self.study), None if self.scale == "cpu" else self.scale)

    @property
    def rows(self) -> list[str]:
        """Return the rows of its table, in order."""
        return list(dict.fromkeys(row_of(run) for run in self.runs))

    def command(self, config: RunConfig) -> str:
        """Return the command that runs one of its runs again."""
        is_known = self.path.parent in (EXPERIMENTS, SHIPPED)
        path = self.path.name if is_known else str(self.path)
        words = ["furina", "run", path]
        words += ["--scale", self.scale] if self.scale else []
        words += ["--rows", row_of(config)] + ["--full"] * self.full
        return shlex.join(words)

    def chosen(
        self,
        rows: Sequence[str] = (),
        tasks: Sequence[str] = (),
        seeds: int | None = None,
        full: bool = False,
    ) -> Suite:
        """Return the suite with only the runs of these rows and tasks, all if none are named.

        `seeds` runs each with the seeds 0 to n − 1, the base once; `full` takes all test questions.
        Raises ConfigurationError for what the suite does not have or would ignore.
        """
        if full and self.study != "cells":
            raise ConfigurationError(
                f"{self.path} is a study of held-out train questions: --full would be ignored."
            )
        if seeds is not None and seeds < 1:
            raise ConfigurationError(f"--seeds {seeds} must be at least 1.")
        places = _only(self, "row", rows, [row_of(run) for run in self.runs])
        places &= _only(self, "task", tasks, [run.task for run in self.runs])
        kept = [run for place, run in enumerate(self.runs) if place in places]
        if not kept:
            raise ConfigurationError(
                f"{self.path} has no runs of {', '.join(rows)} on {', '.join(tasks)}."
            )
        if seeds is not None:
            kept = _seeded(kept, seeds)
        if full:
            kept = [run.updated({"test_size": None, "suite": f"{run.suite}-full"}) for run in kept]
        return replace(self, runs=tuple(kept), full=full)


def named(path: Path, scale: Scale | None) -> str:
    """Return what the records of a suite's folder are kept under at a scale."""
    return path.resolve().name + (f"-{scale}" if scale else "")


def row_of(config: RunConfig) -> str:
    """Return the row of its suite's table that a run belongs to."""
    return config.row or config.method


def title(config: RunConfig) -> str:
    """Return what a run is called in messages."""
    return f"{row_of(config)} on {config.task}, seed {config.seed}"


def _only(suite: Suite, what: str, wanted: Sequence[str], names: list[str]) -> set[int]:
    """Return the places of the runs whose row or task is wanted, all if none is named."""
    known = list(dict.fromkeys(names))
    for name in wanted:
        if name not in known and name != "all":
            raise ConfigurationError(
                f"{suite.path} has no runs of {what} {name!r}.{nearest(name, [*known, 'all'])}"
            )
    every = not wanted or "all" in wanted
    return {place for place, name in enumerate(names) if every or name in wanted}


def _seeded(runs: list[RunConfig], seeds: int) -> list[RunConfig]:
    """Return each run with the seeds 0 to n − 1; the base, which none moves, once."""
    made = [run.updated({"seed": n}) for run in runs for n in range(1 if run.is_base else seeds)]
    return [run for index, run in enumerate(made) if run not in made[:index]]
