"""Run one cell of a suite: at most once, by one writer at a time, and leave a record of its end."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from furina.errors import FurinaError
from furina.experiment.config import RunConfig
from furina.records import RecordError, RunRecord, SearchRecord, SelectionRecord, timestamp
from furina.records.cells import publish, suite_cells
from furina.suites.suite import Study, Suite

BUSY_WAIT = 5.0
"""Seconds until a cell that another process is running is looked at again."""
RECORDS: dict[Study, type[RunRecord | SearchRecord | SelectionRecord]] = {
    "cells": RunRecord,
    "search": SearchRecord,
    "selection": SelectionRecord,
}
State = Literal["finished", "skipped", "diverged", "failed", "busy"]


@dataclass(frozen=True)
class Folders:
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
    """How a cell ended: the file of its record, and the reason if it has no numbers."""

    state: State
    file: Path | None = None
    error: str | None = None


def run_one(suite: Suite, config: RunConfig, folders: Folders) -> Outcome:
    """Run a cell, or publish it again if it is finished, and return its outcome.

    A cell that another process is running is left to that process. A killed cell resumes, a failed
    one is tried again, and a diverged one is not, for it would diverge again.
    """
    folder, started = folders.of(config), timestamp()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The system frees the lock when the process dies.
        with FileLock(folder.with_name(f"{folder.name}.lock"), timeout=0):
            return _run(suite, config, folder, folders.results)
    except Timeout:
        return Outcome("busy")
    except Exception as error:  # a bug in one cell must not stop the others
        text = " ".join(str(error).split())
        reason = text if isinstance(error, FurinaError) else f"{type(error).__name__}: {text}"
        written = record_failure(suite, config, started, reason, folders.results)
        return Outcome("failed", written, reason)


def run_when_free(suite: Suite, config: RunConfig, folders: Folders) -> Outcome:
    """Do what `run_one` does, once no other process is running the cell."""
    while (outcome := run_one(suite, config, folders)).state == "busy":
        time.sleep(BUSY_WAIT)
    return outcome


def help_to_train(config: RunConfig, folders: Folders) -> None:
    """Train a cell as a further machine; the first machine scores and records it."""
    from furina.experiment.fit import fit

    folder = folders.of(config)
    if not (config.is_base or (folder / "training.json").exists()):
        fit(config.cell, folder)


def _run(suite: Suite, config: RunConfig, folder: Path, results: Path) -> Outcome:
    """Run a cell unless its folder has this study's record, and publish the record."""
    command, file = suite.command(config), folder / f"record-{suite.study}.json"
    state: State = "skipped" if file.exists() else "finished"
    if state == "finished":
        _study(suite.study)(config.cell, folder, command).write(file)
    record = RECORDS[suite.study].read(file)
    if isinstance(record, RunRecord):
        published = publish(record, results, config.suite, config.table_row, command, folder)
        return Outcome("diverged" if record.error else state, published, record.error)
    settings = {**config.to_dict(), "dtype": record.config["dtype"]}
    own = replace(record, config=settings, command=command)
    published = results / suite.folder / own.file_name
    own.write(published)
    return Outcome(state, published)


def _study(study: Study) -> Callable[[RunConfig, Path, str], Any]:
    """Return what runs one cell of a study."""
    from furina.experiment import cell, trials

    runs: dict[Study, Callable[[RunConfig, Path, str], Any]] = {
        "cells": cell.run_cell,
        "search": trials.search_trial,
        "selection": trials.selection_trial,
    }
    return runs[study]


def record_failure(
    suite: Suite, config: RunConfig, started: str, reason: str, results: Path
) -> Path | None:
    """Write the record of a cell that failed, but not over that of one that did not."""
    if suite.study != "cells":
        return None
    from furina.experiment.cell import failed_cell

    command = suite.command(config)
    for cell in suite_cells(results / config.suite):
        with suppress(RecordError):
            if cell.name == config.name and RunRecord.read(cell.file).status != "failed":
                return None
    failed = failed_cell(config.cell, command, started, reason)
    return publish(failed, results, config.suite, config.table_row, command)
