"""Results that are older than a change that moves numbers, as results/numerics.csv dates it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from furina.records import RecordError, RunRecord
from furina.reporting.read.paper import read_lines

NUMERICS = "numerics.csv"
HEADER = ["date", "area", "what"]
SCORES = ("data", "training", "scoring")
"""What moves scores."""
TIMES = ("time",)
"""What moves times and nothing else."""
AREAS = (*SCORES, *TIMES)
"""What a change may move; a second part, as in training/furina, narrows it."""


@dataclass(frozen=True)
class Change:
    """One change that moves numbers: from `date` on, in `area`.

    `area` is data, training, scoring or time, all of it or one part: data/TASK, training/METHOD,
    scoring/ENGINE (shared, lm_eval or generate), time/generation or time/training.
    """

    date: datetime
    area: str
    what: str


def read_changes(path: Path) -> tuple[Change, ...]:
    """Return the dated changes in a file, none where there is no file.

    Raises RecordError on a damaged file, an unknown area, a date without its time zone, or lines
    that are not in order of date.
    """
    if not path.exists():
        return ()
    lines = read_lines(path, HEADER)
    changes = [_change(f"{path}, line {number}", **line) for number, line in enumerate(lines, 2)]
    for earlier, later in pairwise(changes):
        if later.date < earlier.date:
            raise RecordError(f"{path}: {later.what!r} must stand before {earlier.what!r}.")
    if len(set(changes)) < len(changes):
        raise RecordError(f"{path} holds one change twice; keep one of them.")
    return tuple(changes)


def _change(where: str, date: str, area: str, what: str) -> Change:
    kind, slash, part = area.partition("/")
    if kind not in AREAS or bool(slash) != bool(part):
        raise RecordError(
            f"{where}: area {area!r} must be one of {', '.join(AREAS)}, or AREA/PART."
        )
    if not what.strip():
        raise RecordError(f"{where} must say what has changed.")
    return Change(moment(where, date), area, what)


def moment(where: str, date: str) -> datetime:
    """Return a point in time; raises RecordError, naming `where`, for what is none."""
    try:
        found = datetime.fromisoformat(date)
    except ValueError as error:
        raise RecordError(f"{where}: {date!r} is not an ISO 8601 date.") from error
    if found.tzinfo is None:
        raise RecordError(f"{where}: {date!r} must say its time zone, such as +00:00.")
    return found


def stale_notes(
    record: RunRecord, changes: tuple[Change, ...], areas: tuple[str, ...] = SCORES
) -> list[str]:
    """Return a note for each later change that moves numbers of the record, of those in `areas`.

    An area is one of AREAS, or a part of it as in time/training. What counts is when the run
    started: the code that it ran was read then.
    """
    started = moment(record.name, record.started)
    held = [part for part in _parts(record) if any(_is_in(part, area) for area in areas)]
    return [
        f"made before: {change.what}"
        for change in changes
        if started < change.date and any(_is_in(part, change.area) for part in held)
    ]


def _parts(record: RunRecord) -> Iterator[str]:
    """Yield the parts of areas that the record's numbers come from."""
    yield from (f"data/{data.task}" for data in record.data)
    yield from (f"scoring/{score.engine}" for score in record.evaluations)
    if record.training:
        yield from (f"training/{record.method}", "time/training")
    if record.latency:
        yield "time/generation"


def _is_in(part: str, area: str) -> bool:
    return part == area or part.startswith(f"{area}/")
