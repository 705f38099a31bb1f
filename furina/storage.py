"""Files appear whole or not at all: write beside the target, flush to disk, rename."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from furina.errors import FurinaError


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk or of permissions into one sentence about `path`."""
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and run the command again",
        errno.EDQUOT: "the disk quota is used up; free some space and run the command again",
        errno.EACCES: "permission denied; choose a folder you may write to",
        errno.EROFS: "the file system is read-only; choose another folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
        errno.EEXIST: "a part of the path is a file, not a folder; choose another path",
        errno.EISDIR: "there is a folder of that name; choose another path",
        errno.EFBIG: "the file is larger than this system allows; choose another disk",
        errno.EIO: "the disk reports an input/output error; choose another disk",
        errno.EBUSY: "it is a mount point or in use; choose another path",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in reasons:
            raise
        raise FurinaError(f"Cannot write {path}: {reasons[error.errno]}.") from error
    except SafetensorError as error:  # the writer's way to say that the disk is full
        raise FurinaError(
            f"Cannot write {path}: {error}; free some space and try again."
        ) from error


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write `data` to `path` atomically, making the folder; raises FurinaError on a full disk."""
    path = Path(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=_hidden(path))
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def require_writable(path: Path) -> None:
    """Refuse a path below which nothing can be written, before anything is computed.

    Raises FurinaError where a part of it is a file, or its last existing folder may not be written.
    """
    last = next(part for part in (path, *path.absolute().parents) if part.exists())
    if not last.is_dir():
        raise FurinaError(f"Cannot write {path}: {last} is a file, not a folder; choose another.")
    if not os.access(last, os.W_OK | os.X_OK):
        raise FurinaError(f"Cannot write {path}: permission denied; choose another folder.")


def remove_leftovers(path: Path) -> None:
    """Delete what killed writers of `path` left beside it; nobody may be writing it now."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 `text` to `path` atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON atomically; NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def atomic_directory(path: Path, last: str = "config.json") -> Iterator[Path]:
    """Yield a hidden folder that becomes `path` on success and vanishes on an error.

    A folder that is there stays, be it a mount point or the current one: the finished files take
    the places of its own one by one. `last` is the file without which nobody reads the folder: it
    goes before the others and comes after them, so that a killed process leaves no mixture. Raises
    FurinaError if that would lose a file which the new folder does not have.
    """
    path = Path(path).resolve()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_a_file(path)
        beside = path if path.is_dir() else path.parent  # a mount is a file system of its own
        temporary = Path(tempfile.mkdtemp(dir=beside, prefix=_hidden(path)))
        try:
            yield temporary
            temporary.chmod(0o755)
            _flush(temporary)
            _refuse_a_file(path)
            if path.is_dir():
                _refuse_to_lose_files(temporary, path)
                _exchange(temporary, path, last)
            else:
                os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _hidden(path: Path) -> str:
    """Return how the names of unfinished files and folders for `path` begin."""
    return f".{path.name}."


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors' are their owner's alone
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def _refuse_a_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FurinaError(f"Cannot write the folder {path}: there is a file of that name.")


def _refuse_to_lose_files(new: Path, path: Path) -> None:
    files = [file.relative_to(path) for file in sorted(path.rglob("*")) if not file.is_dir()]
    own = [file for file in files if not file.parts[0].startswith(_hidden(path))]
    foreign = [str(file) for file in own if not (new / file).exists()]
    if foreign:
        raise FurinaError(
            f"Cannot replace {path}: it holds {len(foreign)} other files, such as {foreign[0]}; "
            "choose another folder, or delete it first."
        )


def _exchange(new: Path, path: Path, last: str) -> None:
    """Put the files of `new` into the places of those in `path`; an error puts the old ones back.

    The old ones wait beside `new`, where they stay if the process is killed.
    """
    files = [file.relative_to(new) for file in sorted(new.rglob("*")) if file.is_file()]
    files.sort(key=lambda file: str(file) == last)
    old = new.with_name(new.name + ".old")
    placed = []
    try:
        for file in reversed(files):
            if (path / file).exists():
                _move(path / file, old / file)
        for file in files:
            placed.append(file)
            _move(new / file, path / file)
    except BaseException:
        for file in reversed(placed):
            (path / file).unlink(missing_ok=True)
        for file in files:
            if (old / file).exists():
                _move(old / file, path / file)
        shutil.rmtree(old, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move(file: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(file, place)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CHECKSUMS = "furina_checksums.json"


def write_checksums(folder: Path) -> None:
    """Note the sha256 of every file in `folder`, for `damaged_file`."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    write_json(folder / CHECKSUMS, {file.name: sha256_file(file) for file in files})


def damaged_file(folder: Path, weights: bool = True) -> Path | None:
    """Return a file that is not what `write_checksums` noted; only with `weights` are those read.

    Where nothing was noted, as in folders of older versions, none is.
    """
    try:
        noted: dict[str, str] = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        for name, digest in noted.items():
            file = folder / name
            if (weights or file.suffix != ".safetensors") and sha256_file(file) != digest:
                return file
    except FileNotFoundError as error:
        missing = Path(error.filename)
        return None if missing.name == CHECKSUMS else missing
    except (ValueError, AttributeError):
        return folder / CHECKSUMS
    return None
