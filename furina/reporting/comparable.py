"""What every number of one table must have in common, told file by file."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path

from furina.records import RecordError

Fact = tuple[str, Hashable, Hashable]
"""What is the same, within what, and its value there."""


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
