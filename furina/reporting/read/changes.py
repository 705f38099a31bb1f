"""Results that are older than a change that moves numbers, as results/numerics.csv dates it."""

from __future__ import annotations

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

    def touches(self, record: RunRecord) -> bool:
        """Tell whether the record holds numbers that the change moves, had it been made then."""
        kind, _, part = self.area.partition("/")
        found = _parts(record)[kind]
        return part in found if part else bool(found)


def _parts(record: RunRecord) -> dict[str, set[str]]:
    """Return by area what of it the record's numbers come from."""
    return {
        "data": {data.task for data in record.data},
        "training": {record.method} if record.training else set(),
        "scoring": {score.engine for score in record.evaluations},
        "time": {
            what
            for what, timed in (("generation", record.latency), ("training", record.training))
            if timed
        },
    }


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
    """Return a note for each later change that touches the record, of those in `areas`.

    An area is one of AREAS, or a part of it as in time/training. What counts is when the run
    started: the code that it ran was read then.
    """
    started = moment(record.name, record.started)
    return [
        f"made before: {change.what}"
        for change in changes
        if started < change.date and change.touches(record) and _within(change.area, areas)
    ]


def _within(area: str, areas: tuple[str, ...]) -> bool:
    """Tell whether an area has something of `areas` in it."""
    kind, _, part = area.partition("/")
    wanted = (each.partition("/") for each in areas)
    return any(kind == one and (not part or not other or part == other) for one, _, other in wanted)
