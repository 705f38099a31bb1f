"""Rows out of files, by kind of file; a damaged one is one sentence."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, cast

from furina.data.rows import Row
from furina.errors import DataError

Stream = IO[bytes] | gzip.GzipFile
Read = Callable[[Stream, str], Iterator[Row]]


@contextmanager
def refuse_damage(where: str, remedy: str = "fetch or copy it again") -> Iterator[None]:
    """Raise DataError where what is read inside cannot be decoded."""
    try:
        yield
    except (
        *(OSError, EOFError, zlib.error, zipfile.BadZipFile, csv.Error, ValueError),
        *(KeyError, RuntimeError),  # a name that an archive lacks, a file that it calls encrypted
    ) as error:
        raise DataError(f"{where} is damaged ({error}): {remedy}.") from error


def read_file(name: str, stream: IO[bytes], where: str) -> list[Row]:
    """Return all rows of a file: JSON lines, a JSON list, CSV or Arrow, gzipped if so named.

    A CSV file's rows are `{"file": its name, "cells": [...]}`: there is no header.

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


def read_requests(config: bytes, stream: IO[bytes], where: str) -> list[Row]:
    """Return the documents of a gzipped file of evaluation requests, in order, each once.

    There is one request a choice, and behind all documents a second, bare copy of each: those
    begin at the number that `config` names, if any.

    Raises:
        DataError: it is damaged, or lacks one of the documents that `config` counts.
    """
    with refuse_damage(where):
        count = json.loads(config).get("num_instances") or 0
        first: dict[int, Row] = {}
        with gzip.open(stream) as unzipped:
            for request in _json_lines(unzipped, where):
                if not count or request["doc_id"] < count:
                    first.setdefault(request["doc_id"], request["doc"])
        if missing := sorted(set(range(count)) - set(first)):
            raise ValueError(f"document {missing[0]} of {count} is missing")
    return [first[number] for number in sorted(first)]


def _json_lines(stream: Stream, name: str) -> Iterator[Row]:
    # A binary file's lines end at newlines alone, not at the separators Unicode allows in a text.
    return (json.loads(line) for line in stream if line.strip())


def _json_list(stream: Stream, name: str) -> Iterator[Row]:
    return iter(json.load(stream))


def _cells(stream: Stream, name: str) -> Iterator[Row]:
    text = io.TextIOWrapper(cast("IO[bytes]", stream), encoding="utf-8", newline="")
    return ({"file": name, "cells": cells} for cells in csv.reader(text, strict=True) if cells)


def _arrow_rows(stream: Stream, name: str) -> Iterator[Row]:
    import pyarrow

    return iter(pyarrow.ipc.open_stream(stream.read()).read_all().to_pylist())


_READERS: dict[str, Read] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _cells,
    ".arrow": _arrow_rows,
}
