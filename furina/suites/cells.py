"""Run one cell of a suite: at most once, by one writer at a time, and leave a record of its end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from filelock import FileLock, Timeout

from furina.errors import FurinaError
from furina.experiment.config import RunConfig
from furina.records import RecordError, RunRecord, SearchRecord, SelectionRecord, timestamp
from furina.suites.suites import Study, Suite

BUSY_WAIT = 5.0
"""Seconds until a cell that another process is running is looked at again."""
T = TypeVar("T", SearchRecord, SelectionRecord)
R = TypeVar("R", RunRecord, SearchRecord, SelectionRecord)
State = Literal["finished", "skipped", "diverged", "failed", "busy"]


@dataclass(frozen=True)
class Places:
    """Where records go, and where cells keep checkpoints, logs and what they have measured."""

    results: Path = Path("results")
    runs: Path = Path("runs")

    def of(self, config: RunConfig) -> Path:
        """Return a cell's own folder, which suites that share the cell share.

        Where "auto" stands for another dtype it is another cell.
        """
        settings = json.dumps(config.cell.resolved().to_dict(), sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        return self.runs / "cells" / f"{config.cell.name}-{digest}"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: the file of its record, and why it has no numbers if it has none."""

    state: State
    file: Path | None = None
    error: str | None = None


def run_one(suite: Suite, config: RunConfig, places: Places) -> Outcome:
    """Run a cell, or publish it again if it is finished, and say what became of it.

    A cell that another process is running is left to it. One that was killed goes on where it was;
    one that failed is tried again, one that diverged is not: it would diverge again.
    """
    folder, started = places.of(config), timestamp()
    try:
        with _held(folder):
            finished = _record_file(folder, suite.study).exists()
            file, diverged = _STUDIES[suite.study](suite, config, folder, places.results)
            state: State = "diverged" if diverged else "skipped" if finished else "finished"
            return Outcome(state, file, diverged)
    except Timeout:
        return Outcome("busy")
    except Exception as error:  # a bug in one cell must not stop the others
        reason = _sentence(error)
        written = record_failure(suite, config, started, reason, places.results)
        return Outcome("failed", written, reason)


def run_when_free(suite: Suite, config: RunConfig, places: Places) -> Outcome:
    """Do what `run_one` does, after the process that is running the cell if there is one."""
    outcome = run_one(suite, config, places)
    while outcome.state == "busy":
        time.sleep(BUSY_WAIT)
        outcome = run_one(suite, config, places)
    return outcome


def help_to_train(config: RunConfig, places: Places) -> None:
    """Take a further machine's part in training a cell, which the first one scores and records."""
    from furina.experiment.fit import fit

    folder = places.of(config)
    if not (config.is_base or (folder / "training.json").exists()):
        fit(config.cell, folder)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a cell's lock, which the system frees when the process dies; raises Timeout if taken."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0):
        yield


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, FurinaError) else f"{type(error).__name__}: {text}"


def _cell(suite: Suite, config: RunConfig, folder: Path, results: Path) -> tuple[Path, str | None]:
    from furina.experiment.cell import publish, run_cell

    command = suite.command(config)
    file = _record_file(folder, suite.study)
    record = _kept(file, RunRecord.read, partial(run_cell, config.cell, folder, command))
    return publish(record, config, command, folder, results / config.suite), record.error


def _search(
    suite: Suite, config: RunConfig, folder: Path, results: Path
) -> tuple[Path, str | None]:
    from furina.experiment.trials import search_trial

    command = suite.command(config)
    file = _record_file(folder, suite.study)
    trial = _kept(file, SearchRecord.read, partial(search_trial, config.cell, folder, command))
    return _written(trial, config, command, results / suite.folder), None


def _selection(
    suite: Suite, config: RunConfig, folder: Path, results: Path
) -> tuple[Path, str | None]:
    from furina.experiment.trials import selection_trial

    command, read = suite.command(config), SelectionRecord.read
    file = _record_file(folder, suite.study)
    trial = _kept(file, read, partial(selection_trial, config.cell, folder, command))
    return _written(trial, config, command, results / suite.folder), None


_STUDIES: dict[Study, Callable[[Suite, RunConfig, Path, Path], tuple[Path, str | None]]] = {
    "cells": _cell,
    "search": _search,
    "selection": _selection,
}


def _record_file(folder: Path, study: Study) -> Path:
    """Return where a finished cell keeps its record: studies may share what was trained."""
    return folder / f"record-{study}.json"


def _kept(file: Path, read: Callable[[Path], R], run: Callable[[], R]) -> R:
    """Return the record that a finished cell keeps, made now if there is none."""
    if not file.exists():
        run().write(file)
    return read(file)


def _written(trial: T, config: RunConfig, command: str, folder: Path) -> Path:
    settings = {**config.to_dict(), "dtype": trial.config["dtype"]}
    own = replace(trial, config=settings, command=command)
    file = folder / own.file_name
    own.write(file)
    return file


def record_failure(
    suite: Suite, config: RunConfig, started: str, reason: str, results: Path
) -> Path | None:
    """Write the record of a cell that failed, but not over that of one that did not."""
    if suite.study != "cells":
        return None
    from furina.experiment.cell import failed_cell

    file = results / config.suite / f"{config.name}.json"
    with suppress(RecordError):
        if RunRecord.read(file).status != "failed":
            return None
    failed_cell(config, suite.command(config), started, reason).write(file)
    return file
