"""A suite: the runs that belong in one table, and how to choose some of them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from furina.errors import ConfigurationError, nearest
from furina.experiment.config import RunConfig
from furina.suites.files import EXPERIMENTS, SHIPPED

Study = Literal["cells", "search", "selection"]
Scale = Literal["cpu", "paper"]


@dataclass(frozen=True)
class Suite:
    """Runs that belong in one table.

    `study` is "cells" (fine-tune, score, merge, time), "search" (score on held-out train questions)
    or "selection" (expert selection on held-out train questions). `scale` is None for a suite that
    has only one. `full` is whether all test questions are scored. `origins` says for each run which
    file or option gives a value, by the option's name; the others are defaults.
    """

    path: Path
    study: Study
    runs: tuple[RunConfig, ...] = field(repr=False)
    origins: tuple[Mapping[str, str], ...] = field(repr=False, compare=False)
    scale: Scale | None = None
    full: bool = False

    @property
    def name(self) -> str:
        """Return the folder's name, with the scale if it has any."""
        return named(self.path, self.scale) + "-full" * self.full

    @property
    def folder(self) -> str:
        """Return the folder of a study's records; cells are listed in their suite's."""
        return named(Path(self.study), None if self.scale == "cpu" else self.scale)

    @property
    def rows(self) -> list[str]:
        """Return the rows of its table, in order."""
        return list(dict.fromkeys(run.table_row for run in self.runs))

    def command(self, config: RunConfig) -> str:
        """Return the command that runs one of its runs again."""
        is_known = self.path.parent in (EXPERIMENTS, SHIPPED)
        path = self.path.name if is_known else str(self.path)
        words = ["furina", "run", path]
        words += ["--scale", self.scale] if self.scale else []
        words += ["--rows", config.table_row] + ["--full"] * self.full
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
        wanted_rows = self._known("row", rows, self.rows)
        wanted_tasks = self._known("task", tasks, [run.task for run in self.runs])
        kept = [
            (run, origins)
            for run, origins in zip(self.runs, self.origins, strict=True)
            if run.table_row in wanted_rows and run.task in wanted_tasks
        ]
        if not kept:
            raise ConfigurationError(
                f"{self.path} has no runs of {', '.join(rows)} on {', '.join(tasks)}."
            )
        if seeds is not None:  # no seed moves the base
            kept = [
                (run.updated({"seed": seed}), {**origins, "seed": "--seeds"})
                for run, origins in kept
                for seed in range(1 if run.is_base else seeds)
            ]
        if full:
            kept = [
                (
                    run.updated({"test_size": None, "suite": f"{run.suite}-full"}),
                    {**origins, "test_size": "--full", "suite": "--full"},
                )
                for run, origins in kept
            ]
        kept = [pair for i, pair in enumerate(kept) if all(pair[0] != run for run, _ in kept[:i])]
        runs, origins = zip(*kept, strict=True)
        return replace(self, runs=runs, origins=origins, full=full)

    def _known(self, what: str, wanted: Sequence[str], names: Sequence[str]) -> set[str]:
        """Return the rows or tasks that are wanted, all if none is named."""
        known = dict.fromkeys(names)
        for name in wanted:
            if name not in known and name != "all":
                raise ConfigurationError(
                    f"{self.path} has no runs of {what} {name!r}.{nearest(name, [*known, 'all'])}"
                )
        return set(known) if not wanted or "all" in wanted else set(wanted)


def named(path: Path, scale: Scale | None) -> str:
    """Return what the records of a suite's folder are kept under at a scale."""
    return path.resolve().name + (f"-{scale}" if scale else "")
