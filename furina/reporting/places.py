"""The paper's tables and figures, and the suites that repeat them: results/paper/index.csv."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from furina.errors import nearest
from furina.records import RecordError
from furina.reporting.pairs import Measure
from furina.reporting.typed import read_lines

INDEX = "index.csv"
HEADER = ["place", "title", "suite", "numbers", "file", "measure"]
KNOWN = ("all", "partly", "approximately", "none")
ALLOWED = {"numbers": KNOWN, "measure": ("", *get_args(Measure))}


@dataclass(frozen=True)
class Place:
    """A table or figure of the paper, the suite that repeats it, and which numbers we know.

    `file` is the stem of the file that holds those, and `measure` says what they are; both are ""
    where none is known.
    """

    place: str
    title: str
    suite: str
    numbers: str
    file: str
    measure: Measure | Literal[""]

    def scale(self, folder: str) -> str | None:
        """Return at which scale a folder of results repeats it, None if it does not."""
        found = re.fullmatch(rf"{re.escape(self.suite)}(?:-(cpu|paper)(-.+)?)?", folder)
        return None if found is None else "".join(part for part in found.groups() if part)


def read_index(path: Path) -> tuple[Place, ...]:
    """Return the paper's tables and figures in its order; RecordError on a damaged file."""
    return tuple(_place(path, line) for line in read_lines(path, HEADER))


def _place(path: Path, line: dict[str, str]) -> Place:
    for key, known in ALLOWED.items():
        if line[key] not in known:
            raise RecordError(f"{path}: {key} is {line[key]!r}.{nearest(line[key], known)}")
    if len({line["numbers"] != "none", line["file"] != "", line["measure"] != ""}) > 1:
        raise RecordError(f"{path}: {line['title']!r} needs numbers, file and measure, or none.")
    return Place(**line)  # type: ignore[arg-type]  # the loop has checked its words


def place_of(folder: str, places: Sequence[Place]) -> Place | None:
    """Return what a folder of results repeats, None if it is no place of the paper."""
    return next((place for place in places if place.scale(folder) is not None), None)


def in_order(folders: Iterable[str], places: Sequence[Place]) -> list[str]:
    """Return folders of results in the paper's order, those that it does not have at the end."""

    def position(folder: str) -> tuple[int, str]:
        place = place_of(folder, places)
        return len(places) if place is None else places.index(place), folder

    return sorted(folders, key=position)
