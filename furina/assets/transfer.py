"""Download a file: resume it, verify it, and move it into place only if it is right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import requests
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from furina.assets.index import TIMEOUT, local_path, shown
from furina.errors import AssetError
from furina.storage import disk_errors, sha256_file

ATTEMPTS = 5
BLOCK = 1 << 18


def _append(http: requests.Session, url: str, part: Path, bar: Progress) -> None:
    """Continue `part` from its present length, or from zero if the server has no ranges."""
    have = part.stat().st_size if part.exists() else 0
    # Without "identity" a proxy may compress the body, and byte positions would mean nothing.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with http.get(url, headers=headers, timeout=TIMEOUT, stream=True) as response:
        if response.status_code == 416:  # nothing after `have`: whole, or not the same file
            return
        response.raise_for_status()
        if response.status_code != 206:
            have = 0
        length = response.headers.get("Content-Length")
        task = bar.task_ids[0]
        bar.update(task, total=have + int(length) if length else None, completed=have)
        with open(part, "r+b" if have else "wb") as file:
            file.seek(have)
            for block in response.iter_content(BLOCK):
                file.write(block)
                bar.advance(task, len(block))
            file.flush()
            os.fsync(file.fileno())


def _continue(http: requests.Session, url: str, part: Path, bar: Progress) -> None:
    """Fill `part`, taking up a broken connection where it broke."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _append(http, url, part, bar)
        except requests.HTTPError as error:
            status = error.response.status_code
            raise AssetError(f"Cannot fetch {shown(url)}: the server answered {status}.") from error
        except requests.RequestException as error:
            if attempt == ATTEMPTS:
                raise AssetError(
                    f"Cannot fetch {shown(url)}: the connection broke ({type(error).__name__}); "
                    "run `furina assets` again to continue where it stopped."
                ) from error


def download(http: requests.Session, url: str, path: Path, sha256: str, progress: bool) -> None:
    """Fetch `url` to `path`, continuing `path`.part if an earlier call was cut off.

    Raises:
        AssetError: the connection failed, or the bytes are not those `sha256` names.
        FurinaError: the disk is full or the folder cannot be written.
    """
    part = path.with_name(path.name + ".part")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with disk_errors(path), Progress(*columns, disable=not progress) as bar:
        path.parent.mkdir(parents=True, exist_ok=True)
        bar.add_task(path.name, total=None)
        resumed = part.exists()
        if source := local_path(url):
            shutil.copyfile(source, part)
        else:
            _continue(http, url, part, bar)
        if resumed and sha256_file(part) != sha256:  # the old part was of another file: start over
            part.unlink()
            _continue(http, url, part, bar)
        found = sha256_file(part)
        if found != sha256:
            part.unlink()
            raise AssetError(
                f"{shown(url)} is not the pinned file: its sha256 is {found}, expected {sha256}; "
                "the download was removed, check the package index and try again."
            )
        os.replace(part, path)
