"""Files appear whole or not at all, and nothing that was there is lost by accident."""

from __future__ import annotations

import errno
import json
import os
from itertools import count
from pathlib import Path

import pytest
from safetensors import SafetensorError

from furina import storage
from furina.errors import FurinaError
from furina.storage import atomic_directory, sha256_file, write_bytes, write_json, write_text


def failing(code: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below `folder`, hidden ones included."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_text_json_and_bytes_are_written_as_given(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "größer\n")
    write_json(tmp_path / "c.json", {"z": 1, "a": [1.5, "é"]})
    write_bytes(tmp_path / "d", memoryview(b"\0\1"))
    assert (tmp_path / "a" / "b.txt").read_bytes() == "größer\n".encode()
    assert (tmp_path / "c.json").read_text(encoding="utf-8").endswith("}\n")
    assert list(json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))) == ["z", "a"]
    assert (tmp_path / "d").read_bytes() == b"\0\1"
    assert len(contents(tmp_path)) == 3
    digest = "b413f47d13ee2fe6c845b2ee141af81de858df4ec549a58b7970bb96645bc8d2"
    assert sha256_file(tmp_path / "d") == digest


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_json_holds_no_nan_and_a_refused_value_leaves_the_old_file(tmp_path: Path, value) -> None:
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", value)
    assert contents(tmp_path) == {"x.json": b"1\n"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_is_one_sentence_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    write_text(tmp_path / "x", "old")
    monkeypatch.setattr(storage.os, call, failing(code))
    with pytest.raises(FurinaError, match=r"Cannot write .*x: ") as caught:
        write_text(tmp_path / "x", "new")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {"x": b"old"}


def test_an_error_that_says_nothing_about_the_disk_passes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage.os, "replace", failing(errno.ECONNRESET))
    with pytest.raises(ConnectionResetError):
        write_text(tmp_path / "x", "new")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("path", ["file/x", "folder"])
def test_a_file_in_the_way_or_a_folder_of_that_name_is_one_sentence(tmp_path, path: str) -> None:
    (tmp_path / "file").write_text("here")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FurinaError, match="choose another path"):
        write_text(tmp_path / path, "new")
    assert contents(tmp_path) == {"file": b"here"}


def fill(path: Path, **files: str) -> None:
    with atomic_directory(path) as folder:
        for name, text in files.items():
            (folder / name).write_text(text)


def test_a_folder_appears_at_the_end_and_replaces_the_older_one(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "deep" / "x") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "x").exists()
    fill(tmp_path / "deep" / "x", a="2", b="3")
    assert contents(tmp_path) == {"deep/x/a": b"2", "deep/x/b": b"3"}
    assert (tmp_path / "deep" / "x").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt()])
def test_an_interrupted_folder_leaves_the_old_one_and_nothing_else(tmp_path: Path, error) -> None:
    fill(tmp_path / "x", a="old")
    with pytest.raises(type(error)), atomic_directory(tmp_path / "x") as folder:
        (folder / "a").write_text("new")
        raise error
    assert contents(tmp_path) == {"x/a": b"old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_while_a_folder_is_finished_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    fill(tmp_path / "x", a="old")
    monkeypatch.setattr(storage.os, call, failing(errno.ENOSPC))
    with pytest.raises(FurinaError, match="the disk is full"):
        fill(tmp_path / "x", a="new")
    monkeypatch.undo()
    assert contents(tmp_path) == {"x/a": b"old"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("failing_move", range(1, 7))
def test_the_old_files_come_back_if_the_new_ones_cannot_take_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_move: int
) -> None:
    fill(tmp_path / "x", a="old", b="old", config="old")
    replace, moves = os.replace, count(1)

    def one_fails(source: Path, target: Path) -> None:
        if next(moves) == failing_move:
            raise OSError(errno.EIO, "gone")
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", one_fails)
    with pytest.raises(FurinaError, match="input/output"):
        fill(tmp_path / "x", a="new", b="new", config="new")
    assert contents(tmp_path) == {"x/a": b"old", "x/b": b"old", "x/config": b"old"}
    assert next(moves) > failing_move


def test_a_folder_that_is_there_stays_the_same_one(tmp_path: Path, monkeypatch) -> None:
    """As a mount point must, whose parent is another file system or cannot be written."""
    mounted = tmp_path / "mounted"
    mounted.mkdir(mode=0o750)
    (mounted / "lost+found").mkdir()
    before = mounted.stat()

    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(storage.os, "rename", busy)
    for text in ("1", "2"):
        with atomic_directory(mounted) as folder:
            assert mounted in folder.parents
            (folder / "deep").mkdir()
            (folder / "deep" / "a").write_text(text)
        assert contents(mounted) == {"deep/a": text.encode()}
        assert (mounted.stat().st_ino, mounted.stat().st_mode) == (before.st_ino, before.st_mode)


def test_a_read_only_mount_is_said_to_be_read_only(tmp_path: Path, monkeypatch) -> None:
    make = storage.tempfile.mkdtemp

    def mkdtemp(dir: Path, prefix: str) -> str:
        return failing(errno.EROFS)() if dir == tmp_path / "mounted" else make(dir=dir)

    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(storage.tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(storage.os, "rename", failing(errno.EBUSY))
    with pytest.raises(FurinaError, match="the file system is read-only"):
        fill(tmp_path / "mounted", a="1")


def test_the_current_folder_is_not_taken_from_under_ones_feet(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(Path("."), a="1")
    assert os.listdir() == ["a"]


def test_a_path_that_is_a_mount_point_itself_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage.os, "replace", failing(errno.EBUSY))
    with pytest.raises(FurinaError, match="mount point or in use"):
        write_text(tmp_path / "x", "new")


def killed_while_it_writes(path: Path, names: tuple[str, ...], moves: int) -> None:
    """Write new files in a process that dies after that many of them were moved."""
    if (child := os.fork()) == 0:
        replace, left = os.replace, count(moves, -1)
        os.replace = lambda *files: replace(*files) if next(left) else os._exit(1)
        try:
            with atomic_directory(path, last="config") as folder:
                for name in names:
                    (folder / name).write_text("new")
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_a_killed_write_leaves_no_mixture_under_its_last_file(tmp_path: Path) -> None:
    names, states = ("a", "b", "config", "z"), set()
    for moves in range(2 * len(names)):
        path = tmp_path / str(moves)
        fill(path, **dict.fromkeys(names, "old"))
        killed_while_it_writes(path, names, moves)
        found = {name: (path / name).read_text() for name in names if (path / name).exists()}
        assert "config" not in found or found == dict.fromkeys(names, "old")
        states.add(tuple(found.values()))
        fill(path, **dict.fromkeys(names, "again"))  # what was left is in nobody's way
        assert (path / "config").read_text() == "again"
    assert len(states) == 2 * len(names)


def test_the_tensor_writers_own_error_is_one_sentence_too(tmp_path: Path) -> None:
    with pytest.raises(FurinaError, match="No space left"), atomic_directory(tmp_path / "x"):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("foreign", ["notes.txt", "deep/notes.txt", ".hidden"])
def test_a_folder_with_other_files_is_never_replaced(tmp_path: Path, foreign: str) -> None:
    (tmp_path / "x" / foreign).parent.mkdir(parents=True)
    (tmp_path / "x" / foreign).write_text("mine")
    with pytest.raises(FurinaError, match=f"1 other files, such as {foreign}"):
        fill(tmp_path / "x", a="new")
    assert contents(tmp_path) == {f"x/{foreign}": b"mine"}


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FurinaError, match="there is a file of that name"):
        fill(tmp_path / "x", a="new")
    assert contents(tmp_path) == {"x": b"mine"}


def test_an_empty_folder_a_link_and_the_current_folder_will_do(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", a="1")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    fill(tmp_path / "link", a="2")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(Path("."), a="3")
    assert contents(tmp_path) == {"empty/a": b"2", "here/a": b"3", "link/a": b"2"} or (
        contents(tmp_path) == {"empty/a": b"2", "here/a": b"3"}
    )
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 3
