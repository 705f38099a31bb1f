"""Run a suite's unfinished cells one after the other, and report the progress."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from furina.errors import ConfigurationError, FurinaError
from furina.experiment.config import RunConfig
from furina.progress import duration
from furina.records import RecordError, RunRecord
from furina.records.cells import suite_cells
from furina.suites.cells import Folders, Outcome, run_one, run_when_free
from furina.suites.suite import Suite


class FailedRunsError(FurinaError):
    """Some runs of a suite failed or diverged; the others have their records."""


def _print(text: str) -> None:
    print(text, flush=True)  # a pipe shows it now, and above what comes after it on stderr


@dataclass
class Progress:
    """Report how each cell ended, and how long the rest will take at the pace so far.

    `waiting` are the cells that have not ended; `seconds` is how long each finished one took.
    """

    waiting: list[RunConfig]
    say: Callable[[str], None] = _print
    clock: Callable[[], float] = time.monotonic
    jobs: int = 1
    seconds: list[tuple[RunConfig, float]] = field(default_factory=list)
    done: int = 0

    def begin(self, config: RunConfig) -> float:
        """Announce a cell and return when it began."""
        self.say(f"[{self.done + 1}/{self.done + len(self.waiting)}] {config.title}")
        return self.clock()

    def end(self, config: RunConfig, outcome: Outcome, seconds: float) -> None:
        """Report how a cell ended."""
        self.done += 1
        self.waiting.remove(config)
        if outcome.state == "skipped":
            self.say("  finished before: skipped")
            return
        if outcome.state == "finished":
            self.seconds.append((config, seconds))
        error = f": {outcome.error}" if outcome.error else ""
        self.say(f"  {config.title} {outcome.state} after {duration(seconds)}{error}")
        if self.waiting:
            left = self.left()
            about = "" if left is None else f", about {duration(left)}"
            self.say(f"  {len(self.waiting)} left{about}")

    def left(self) -> float | None:
        """Return the seconds that the waiting cells will take, None if unknown."""
        each = [self._expected(config) for config in self.waiting]
        return None if None in each else sum(filter(None, each)) / self.jobs

    def _expected(self, config: RunConfig) -> float | None:
        """Return the mean time of the most similar cells; base tells nothing about training."""
        alike: tuple[Callable[[RunConfig], object], ...] = (
            lambda each: (each.method, each.task),
            lambda each: each.method,
            lambda each: each.is_base,
        )
        for kind in alike:
            found = [took for run, took in self.seconds if kind(run) == kind(config)]
            if found:
                return statistics.fmean(found)
        return None


def run_suite(suite: Suite, folders: Folders) -> list[Path]:
    """Run every cell that is not finished, one after the other; returns the records' files.

    A cell that another process is running comes last, after that process. Raises FailedRunsError
    at the end if runs failed or diverged.
    """
    require_one_dtype(suite, folders)
    progress = Progress(list(suite.runs))
    outcomes: dict[int, Outcome] = {}
    for run in (run_one, run_when_free):
        for index, config in enumerate(suite.runs):
            if index in outcomes:
                continue
            began = progress.begin(config)
            outcome = run(suite, config, folders)
            if outcome.state == "busy":
                progress.say("  another process is running it: it comes last")
                continue
            progress.end(config, outcome, progress.clock() - began)
            outcomes[index] = outcome
    return files_of(suite, [outcomes[index] for index in sorted(outcomes)])


def require_one_dtype(suite: Suite, folders: Folders) -> None:
    """Refuse to put records beside others of the suite that were computed in another dtype.

    Raises ConfigurationError; those that the runs replace do not count.
    """
    if suite.study != "cells":
        return
    replaced = {(run.suite, run.name) for run in suite.runs}
    for name, dtype in {(run.suite, run.resolved().dtype) for run in suite.runs}:
        for cell in suite_cells(folders.results / name):
            if (name, cell.name) in replaced:
                continue
            with suppress(RecordError):  # a damaged one is the report's to name
                other = RunRecord.read(cell.file).config.get("dtype")
                if other != dtype:
                    raise ConfigurationError(
                        f"{cell.file} was computed in {other}, and these runs would be in {dtype}: "
                        "no table holds both, so name a new folder with --results, or run all rows."
                    )


def files_of(suite: Suite, outcomes: list[Outcome]) -> list[Path]:
    """Return the files of the runs that succeeded; raises FailedRunsError if some did not."""
    errors = [
        f"{config.title}: {outcome.error}"
        for config, outcome in zip(suite.runs, outcomes, strict=True)
        if outcome.error
    ]
    if errors:
        states = Counter(outcome.state for outcome in outcomes if outcome.error)
        counts = " and ".join(f"{count} {state}" for state, count in sorted(states.items()))
        raise FailedRunsError(f"Of {len(outcomes)} runs {counts}: {'; '.join(errors)}")
    return [outcome.file for outcome in outcomes if outcome.file]
