"""CSV files that people type, read strictly."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from furina.records import RecordError


def read_lines(path: Path, header: Sequence[str]) -> list[dict[str, str]]:
    """Return a file's lines by column.

    Raises RecordError unless it holds that header and at least one line, each with a text for
    every column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first, *lines = [*csv.reader(file, strict=True)] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is not CSV in UTF-8 ({error}).") from error
    if first != list(header) or not lines:
        raise RecordError(f"{path} must have lines under the header {','.join(header)}.")
    for number, line in enumerate(lines, 2):
        if len(line) != len(header):
            raise RecordError(f"{path}, line {number} must have {len(header)} columns.")
    return [dict(zip(header, line, strict=True)) for line in lines]
