"""The cells of a folder of results: each is stored once, and listed by the suites that show it.

    results/cells/NAME-DIGEST/   record.json, its samples, and activity.json if it was analysed
    results/SUITE/cells.json     the suite's rows, the cell of each, and the command that runs it

A record that lies in the suite's own folder counts as one of its cells too.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from furina.records.activity import ActivityRecord
from furina.records.codec import Record, RecordError
from furina.records.runs import RunRecord
from furina.storage import disk_errors, remove_leftovers, write_bytes

CELLS = "cells"
LIST = "cells.json"
RECORD = "record.json"
ACTIVITY = "activity.json"
LIST_SCHEMA = 1


@dataclass(frozen=True)
class ListedCell:
    """One line of a suite's list: the row, task and seed, and the cell's folder.

    The stored record may bear the names of another suite: `row` and `command` are this suite's.
    """

    row: str
    task: str
    seed: int
    cell: str
    command: str

    @property
    def name(self) -> str:
        """Return what the run is called in its suite."""
        return f"{self.row}--{self.task}--seed{self.seed}"


@dataclass(frozen=True)
class CellList(Record):
    """The cells of a suite, by name."""

    cells: tuple[ListedCell, ...]
    schema: int = LIST_SCHEMA


class SuiteCell(NamedTuple):
    """A cell of a suite: its name there, its record's file, and its line of the list if it has one.

    The file of a cell's activity lies beside its record's.
    """

    name: str
    file: Path
    line: ListedCell | None


def suite_cells(folder: Path) -> list[SuiteCell]:
    """Return the cells of a suite's folder by name; raises RecordError if the list is damaged."""
    stored = folder.parent / CELLS
    cells = [SuiteCell(line.name, stored / line.cell / RECORD, line) for line in _lines(folder)]
    own = (file for file in folder.glob("*.json") if file.name != LIST)
    cells += [SuiteCell(file.stem, file, None) for file in own]
    return sorted(cells, key=lambda cell: f"{cell.name}.json")


def suite_records(folder: Path) -> list[tuple[Path, RunRecord]]:
    """Return the records of a suite's folder with their files, under the suite's names."""
    found = []
    for _, file, line in suite_cells(folder):
        record = RunRecord.read(file)
        if line is not None:
            row = "" if line.row == record.method else line.row
            record = replace(
                record,
                suite=folder.name,
                name=line.name,
                config={**record.config, "suite": folder.name, "row": row},
                command=line.command,
            )
        found.append((file, record))
    return found


def suite_activity(folder: Path) -> dict[Path, ActivityRecord]:
    """Return the activity of a suite's cells that were analysed, by what each is called there."""
    found = {}
    for _, file, line in suite_cells(folder):
        file = file.with_name(ACTIVITY) if line else folder / "activity" / file.name
        if file.exists():
            record = ActivityRecord.read(file)
            if line is not None:
                record = replace(
                    record,
                    suite=folder.name,
                    row=line.row,
                    task=line.task,
                    seed=line.seed,
                    command=line.command,
                )
            found[folder / record.file_name] = record
    return found


def publish(
    record: RunRecord,
    results: Path,
    suite: str,
    row: str,
    command: str,
    run_dir: Path | None = None,
) -> Path:
    """Store a cell with its files of `run_dir`, and list it in a suite; returns the record's file.

    A cell that is stored already is the same: its folder is named by the hash of its record. What
    the suite listed in its place is deleted if no suite lists it any more.
    """
    digest = hashlib.sha256(record.text().encode()).hexdigest()[:8]
    name = f"{record.method}--{record.task}--seed{record.seed}-{digest}"
    line = ListedCell(row, record.task, record.seed, name, command)
    folder = results / CELLS / name
    with _locked(results):
        for part, source in (_parts(record, run_dir) if run_dir else {}).items():
            remove_leftovers(folder / part)
            write_bytes(folder / part, source.read_bytes())
        remove_leftovers(folder / RECORD)
        record.write(folder / RECORD)
        before = _lines(results / suite)
        kept = [each for each in before if each.name != line.name]
        cells = tuple(sorted([*kept, line], key=lambda each: f"{each.name}.json"))
        remove_leftovers(results / suite / LIST)
        CellList(cells).write(results / suite / LIST)
        (results / suite / f"{line.name}.json").unlink(missing_ok=True)
        _drop(results, {each.cell for each in before} - {each.cell for each in cells})
    return folder / RECORD


def _lines(folder: Path) -> tuple[ListedCell, ...]:
    file = folder / LIST
    return CellList.read(file).cells if file.exists() else ()


def _parts(record: RunRecord, run_dir: Path) -> dict[str, Path]:
    """Return what a cell has beside its record, by name."""
    names = {score.samples for score in record.evaluations if score.samples}
    if (run_dir / ACTIVITY).exists():
        names.add(ACTIVITY)
    return {name: run_dir / name for name in sorted(names)}


def _drop(results: Path, cells: set[str]) -> None:
    """Delete those cells that no suite lists; none where a list cannot be read."""
    try:
        suites = {file.parent for file in results.glob(f"*/{LIST}")} if cells else set()
        listed = {line.cell for suite in suites for line in _lines(suite)}
    except RecordError:
        return
    for cell in cells - listed:
        shutil.rmtree(results / CELLS / cell, ignore_errors=True)


@contextmanager
def _locked(results: Path) -> Iterator[None]:
    """Let one process at a time change what is stored and listed."""
    with disk_errors(results / CELLS):
        (results / CELLS).mkdir(parents=True, exist_ok=True)
    with FileLock(results / CELLS / ".lock"):
        yield
