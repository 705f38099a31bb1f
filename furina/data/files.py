"""Read the rows of a file by its kind; say in one sentence where it is damaged."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, cast

from furina.data.parsing import Row, index, value
from furina.errors import DataError

Stream = IO[bytes] | gzip.GzipFile
Located = tuple[str, Row]
"""Where a row stands in its file, such as "line 7", and the row."""
Read = Callable[[Stream, str], Iterator[Located]]

# A KeyError is a name that an archive lacks, a RuntimeError a file that it calls encrypted.
_UNREADABLE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error)
_DAMAGE = (*_UNREADABLE, ValueError, KeyError, RuntimeError)


@contextmanager
def refuse_damage(where: str, remedy: str = "fetch or copy it again") -> Iterator[None]:
    """Raise DataError if what is read inside cannot be decoded."""
    try:
        yield
    except _DAMAGE as error:
        raise DataError(f"{where} is damaged ({error}): {remedy}.") from error


def read_file(name: str, stream: IO[bytes], where: str) -> list[Located]:
    """Return all rows of a file: JSON lines, a JSON list, CSV or Arrow, gzipped if so named.

    A CSV file has no header: its rows are `{"file": its name, "cells": [...]}`.

    Raises:
        DataError: it is damaged or of an unknown kind.
    """
    plain = PurePath(name.removesuffix(".gz"))
    if plain.suffix not in _READERS:
        raise DataError(f"{where} is of an unknown kind: name one of {', '.join(_READERS)}.")
    read = _READERS[plain.suffix]
    with refuse_damage(where):
        if not name.endswith(".gz"):
            return list(read(stream, plain.stem))
        with gzip.open(stream) as unzipped:
            return list(read(unzipped, plain.stem))


def read_requests(config: bytes, stream: IO[bytes], where: str) -> list[Located]:
    """Return the documents of a gzipped file of evaluation requests, in order, each once.

    There is one request per choice. After all documents may come a bare copy of each, from the
    number on that `config` names.

    Raises:
        DataError: it is damaged, or lacks one of the documents that `config` counts.
    """
    with refuse_damage(where):
        count = json.loads(config).get("num_instances") or 0
        first: dict[int, Row] = {}
        with gzip.open(stream) as unzipped:
            for _, request in _json_lines(unzipped, where):
                number = index(request, "doc_id")
                if not count or number < count:
                    first.setdefault(number, value(request, "doc"))
        if missing := sorted(set(range(count)) - set(first)):
            raise ValueError(f"document {missing[0]} of {count} is missing")
    return [(f"document {number}", first[number]) for number in sorted(first)]


def numbered(rows: Iterable[Row]) -> Iterator[Located]:
    """Locate every row by its number, counted from 1."""
    return ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _json_lines(stream: Stream, name: str) -> Iterator[Located]:
    # A binary file's lines end at newlines alone, not at the separators Unicode allows in a text.
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number} is no JSON") from error


def _json_list(stream: Stream, name: str) -> Iterator[Located]:
    rows = json.load(stream)
    if not isinstance(rows, list):
        raise ValueError("it holds no list")
    return numbered(rows)


def _cells(stream: Stream, name: str) -> Iterator[Located]:
    # Excel begins a file with a byte order mark, behind which a quotation mark would quote nothing.
    text = io.TextIOWrapper(cast("IO[bytes]", stream), encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    line = 1  # of the row's beginning: a quoted cell may hold further ones
    try:
        for cells in reader:
            if cells:
                yield f"line {line}", {"file": name, "cells": cells}
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}") from error


def _arrow_rows(stream: Stream, name: str) -> Iterator[Located]:
    import pyarrow

    return numbered(pyarrow.ipc.open_stream(stream.read()).read_all().to_pylist())


_READERS: dict[str, Read] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _cells,
    ".arrow": _arrow_rows,
}
