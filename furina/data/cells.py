"""One cell of a row at a time: what it must be, or a ValueError that says what it is instead.

Nothing is converted that could be something else: a null is not "None", a text no list of letters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)


def cell(row: Row, name: str) -> Any:
    """Return what the row has under `name`, whatever it is."""
    if not isinstance(row, Mapping):
        raise ValueError(f"it is {_shown(row)} and no object with named fields")
    if name not in row:
        raise ValueError(f"it has no field {name!r}")
    return row[name]


def text(row: Row, name: str) -> str:
    """Return a text; one that must not be blank is refused where it becomes an item."""
    value = cell(row, name)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {_shown(value)} and no text")
    return value


def texts(row: Row, name: str, count: int | None = None) -> tuple[str, ...]:
    """Return a list of texts, `count` of them if that is given."""
    value = cell(row, name)
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name!r} is {_shown(value)} and no list of texts")
    if count not in (None, len(value)):
        raise ValueError(f"{name!r} has {len(value)} texts, not {count}")
    return tuple(value)


def index(row: Row, name: str, first: int = 0) -> int:
    """Return a choice's place, counted from 0, where the source counts from `first`."""
    value = cell(row, name)
    is_digits = isinstance(value, str) and re.fullmatch("[0-9]+", value)
    if isinstance(value, bool) or not (isinstance(value, int) or is_digits):
        raise ValueError(f"{name!r} is {_shown(value)} and no whole number")
    if (number := int(value) - first) < 0:
        raise ValueError(f"{name!r} is {_shown(value)} and counts from {first}")
    return number


def place(label: str, labels: Iterable[str]) -> int:
    """Return where `label` stands among labels that differ."""
    labels = list(labels)  # "BC" is in a text ABCD, and none of its letters
    if len(set(labels)) < len(labels):
        raise ValueError(f"the labels {', '.join(labels)} repeat one")
    if label not in labels:
        raise ValueError(f"the answer {label!r} is none of the labels {', '.join(labels)}")
    return labels.index(label)


def number_text(value: object) -> str:
    """Return a number as the text it is compared by: no thousands' commas, no trailing ".0".

    Raises:
        ValueError: it is no finite number, or has a comma that parts no thousands.
    """
    written = "" if isinstance(value, bool) else str(value).strip()
    if not _NUMBER.fullmatch(written):
        raise ValueError(f"{_shown(value)} is no number")
    return re.sub(r"\.0+$", "", written.replace(",", ""))


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:39]}…"
