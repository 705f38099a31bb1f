"""Read a suite's records and refuse to tabulate what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from furina.records import RecordError, RunRecord, Score
from furina.records.cells import suite_records
from furina.reporting.read.changes import NUMERICS, SCORES, Change, read_changes, stale_notes

# These may differ between the seeds of one row without changing what the row measures.
FREE_KEYS = {"seed", "name", "checkpoint_interval", "validation_interval", "data_dir", "source"}

R = TypeVar("R")
Fact = tuple[str, Hashable, Hashable]
"""What is the same, within what, and its value there."""


@dataclass(frozen=True)
class Run:
    """A record and the file it came from."""

    path: Path
    record: RunRecord

    @property
    def succeeded(self) -> bool:
        """Tell whether its numbers may enter a table."""
        return self.record.status == "success"

    @property
    def protocol(self) -> str | None:
        """Return the protocol of its first score, None without any."""
        scores = self.record.evaluations
        return scores[0].protocol if scores else None

    def tasks(self, protocol: str) -> set[str]:
        """Return the tasks it scored under a protocol; those meant to be if it has no score."""
        if self.record.evaluations:
            return {s.task for s in self.record.evaluations if s.protocol == protocol}
        if self.record.data:
            return {data.task for data in self.record.data if data.test_sha256}
        return self._planned(protocol)

    def _planned(self, protocol: str) -> set[str]:
        """Return what its config says is scored; a run may fail before it has read any data."""
        config = self.record.config
        named = config.get("score") or config.get("mixture") or [self.record.task]
        pairs = (
            str(entry).partition(":")
            for entry in (named if isinstance(named, (list, dict)) else ())
        )
        return {
            task
            for task, _, asked in pairs
            if (asked or config.get("protocol", protocol)) == protocol
        }

    def score(self, variant: str, task: str, protocol: str, metric: str) -> Score | None:
        """Return one score, None where it was not taken."""
        wanted = variant, task, protocol, metric
        scores = self.record.evaluations
        return next(
            (s for s in scores if (s.variant, s.task, s.protocol, s.metric) == wanted), None
        )


@dataclass(frozen=True, eq=False)
class Results:
    """The comparable runs of one folder; its tables show one metric of one protocol.

    Two readings of a folder are two suites, since its files may have changed in between. `changes`
    are the dated changes that move numbers, by which a run may be out of date; `left_out` are
    scored tasks that its tables do not show; `papers_rows` are the rows that the paper has too, in
    its order.
    """

    name: str
    protocol: str
    metric: str
    runs: tuple[Run, ...]
    changes: tuple[Change, ...] = ()
    left_out: frozenset[str] = frozenset()
    papers_rows: tuple[str, ...] = ()

    @property
    def rows(self) -> list[str]:
        """Return the rows of its tables: base, the paper's, others by trainable parameters."""
        ours = dict.fromkeys(run.record.row for run in sorted(self.runs, key=_row_order))
        return [row for row in dict.fromkeys(("base", *self.papers_rows, *ours)) if row in ours]

    @property
    def tasks(self) -> list[str]:
        """Return the scored tasks by name."""
        scored = {task for run in self.runs for task in run.tasks(self.protocol)}
        return sorted(scored - self.left_out)

    @property
    def trained(self) -> list[str]:
        """Return what was trained by name: tasks, or mixtures."""
        return sorted({run.record.task for run in self.runs})

    @property
    def dtype(self) -> str:
        """Return what its numbers were computed in."""
        return next((str(run.record.config.get("dtype")) for run in self.runs if run.succeeded), "")

    @property
    def taught(self) -> set[str]:
        """Return the tasks that some run has rows of in its training data."""
        return {data.task for run in self.runs for data in run.record.data if data.train_sha256}

    def without_general_tasks(self) -> Results:
        """Return the suite without tasks that no run trained, unless it has no others."""
        taught = self.taught.intersection(self.tasks)
        return replace(self, left_out=frozenset(self.tasks) - taught) if taught else self

    def select(self, row: str, task: str | None = None) -> list[Run]:
        """Return the successful runs of one row, all or those that scored a task."""
        return [
            run
            for run in self.runs
            if run.succeeded
            and run.record.row == row
            and (task is None or task in run.tasks(self.protocol))
        ]

    @property
    def failures(self) -> list[Run]:
        """Return the runs that diverged or failed."""
        return [run for run in self.runs if not run.succeeded]

    def failed(self, row: str, task: str) -> list[Run]:
        """Return the failures of one row that were to score a task."""
        lost = (run for run in self.failures if run.record.row == row)
        return [run for run in lost if task in run.tasks(self.protocol)]

    def stale_notes(self, runs: Iterable[Run], areas: tuple[str, ...] = SCORES) -> list[str]:
        """Return what has changed since the runs and moves numbers of `areas`."""
        return [note for run in runs for note in stale_notes(run.record, self.changes, areas)]


def _row_order(run: Run) -> tuple[bool, float, str]:
    training = run.record.training
    size = training.trainable if training else float("inf")
    return run.record.row != "base", size, run.record.row


def read_folder(folder: Path, read: Callable[[Path], R]) -> dict[Path, R]:
    """Return the records of a folder by file, in file-name order."""
    return {path: read(path) for path in sorted(folder.glob("*.json"))}


def load_suites(folder: Path, metric: str | None = None) -> list[Results]:
    """Read the suite of `folder` once per protocol, the one it was trained under first.

    The metric defaults to the one each record lists first under the protocol. The changes that
    move numbers are read from the file beside the suites' folders, where there is one. Raises
    RecordError naming two files that cannot be compared.
    """
    runs = tuple(Run(path, record) for path, record in suite_records(folder))
    if not runs:
        raise RecordError(f"There are no run records in {folder}; run `furina run` first.")
    _check_rows(runs)
    require_comparable((run.path, _facts(run, metric)) for run in runs)
    changes = read_changes(folder.parent / NUMERICS)
    first: dict[str, str] = {}
    for run in runs:
        for score in run.record.evaluations:
            first.setdefault(score.protocol, score.metric)
    return [
        Results(folder.name, protocol, metric or main, runs, changes)
        for protocol, main in (first or {"text": "acc"}).items()
    ]


def _check_rows(runs: Iterable[Run]) -> None:
    """Refuse another name for the untouched backbone, and what is there twice."""
    seen: dict[Hashable, Path] = {}
    for run in runs:
        row, task, seed = run.record.row, run.record.task, run.record.seed
        if (run.record.method == "base") != (row == "base"):
            raise RecordError(
                f"{run.path} is row {row!r} of method {run.record.method!r}: the untouched "
                "backbone, and nothing else, is row 'base'."
            )
        if (first := seen.setdefault((row, task, seed), run.path)) != run.path:
            raise RecordError(
                f"{first} and {run.path} both hold {row} on {task}, seed {seed}; keep one of them."
            )
        for asked in {(score.task, score.protocol) for score in run.record.evaluations}:
            if (first := seen.setdefault((row, seed, *asked), run.path)) != run.path:
                raise RecordError(
                    f"{first} and {run.path} both score {row}, seed {seed}, on {asked[0]} under "
                    f"{asked[1]}; keep them in two suites."
                )


def _facts(run: Run, metric: str | None) -> Iterator[Fact]:
    """Yield what every run must have the same of; the dtype first, which the hash depends on."""
    record = run.record
    if run.succeeded:
        yield from dtype_facts(record.config)
    if record.backbone.sha256:  # a run may fail before the backbone is loaded
        yield "the backbone's hash", "", record.backbone.sha256
    for data in record.data:
        if data.test_sha256:
            yield "the test subset", data.task, data.test_subset
            yield "the test rows' hash", data.task, data.test_sha256
    if record.evaluations:
        yield "the protocol", "", run.protocol
        yield "the metric", "", metric or record.evaluations[0].metric
    for score in record.evaluations:
        asked = score.task, score.protocol
        yield "the protocol's version", asked, score.protocol_version
        yield "the first prompt's hash", asked, score.first_prompt_sha256
        yield "the scoring engine", asked, score.engine
        yield "the lm-eval version", "", score.lm_eval
        yield "the number of questions", asked, score.n
    for latency in record.latency:
        yield "the number of prompt tokens", "", latency.prompt_tokens
        yield "the number of new tokens", "", latency.new_tokens
    if run.succeeded:
        cell = (record.row, record.task)
        for key, setting in record.config.items():
            if key not in FREE_KEYS:
                yield f"the setting {key}", cell, json.dumps(setting, sort_keys=True)


def require_comparable(files: Iterable[tuple[Path, Iterable[Fact]]]) -> None:
    """Refuse two values of one fact; raises RecordError naming the two files and their values."""
    seen: dict[Hashable, tuple[Path, Hashable]] = {}
    for path, facts in files:
        for what, scope, value in facts:
            first, expected = seen.setdefault((what, scope), (path, value))
            if value != expected:
                raise RecordError(
                    f"{first} and {path} cannot share a table: {what} is {expected!r} in the "
                    f"first and {value!r} in the second; keep them in two suites or run one again "
                    "like the other."
                )


def dtype_facts(config: Mapping[str, object]) -> Iterator[Fact]:
    """Yield the dtype that a record's numbers were computed in: rounding moves scores and times."""
    yield "the dtype", "", str(config.get("dtype"))
