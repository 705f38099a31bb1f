"""Where a backbone's name leads, as far as this machine tells: nothing is loaded, no hub asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from furina.assets import ASSETS, locate
from furina.assets.hub import cached_file
from furina.backbones.tiny import TINY
from furina.errors import ConfigurationError, nearest, suggestion
from furina.model.config_file import CONFIG_FILE


def models() -> list[str]:
    """Return the models that `furina assets` fetches."""
    return [asset.name for asset in ASSETS.values() if asset.kind == "model"]


def local_folder(name: str) -> Path | None:
    """Return the folder of a backbone, None for a tiny one or what only the hub may know.

    Raises ConfigurationError for a name that leads to no model or to an adapter, and AssetError
    for an asset that is not cached.
    """
    if name in TINY:
        return None
    if name in models():
        return locate(name)
    folder = Path(name).expanduser()
    refuse_adapters(name, folder)
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or is_local(name):
        held = "a Hugging Face folder holds a config.json" if folder.exists() else "it is not there"
        raise ConfigurationError(f"{name} is no model folder: {held}.")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) and cached_file(name, "config.json") is None:
        raise ConfigurationError(
            f"{name!r} is no name of a model on the hub: that is ORGANISATION/NAME. There is no "
            f"folder {name} either.{meant(name)}"
        )
    return None


def require_targets(name: str, targets: Sequence[str] | None) -> None:
    """Refuse a backbone's name as `local_folder` does, and a target that none of its files knows.

    Only a plain name is looked for, as the last part of names; `adapt` knows the rest.
    """
    folder = local_folder(name)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    known: set[str] = set()
    for file in files if targets else ():
        with safe_open(file, "np") as opened:
            tensors = opened.keys()
            known.update(part for tensor in tensors for part in tensor.split("."))
    for target in targets or ():
        leaf = target.rpartition(".")[2]
        if known and leaf not in known and not set("*?[") & set(leaf):
            near = suggestion(leaf, (part for part in known if not part.isdigit()))
            raise ConfigurationError(f"Target {target!r} matches no module of {name}.{near}")


def is_local(name: str) -> bool:
    """Return whether a name can only be that of a folder."""
    return name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def refuse_adapters(name: str, folder: Path) -> None:
    """Raise ConfigurationError if a folder holds an adapter."""
    if (folder / CONFIG_FILE).is_file():
        raise ConfigurationError(
            f"{name} is a furina adapter folder and no backbone: name the model it was trained on, "
            "and give this folder as the adapter."
        )
    if (folder / "adapter_config.json").is_file():
        raise ConfigurationError(
            f"{name} holds a PEFT adapter and is no backbone: merge it into its model with peft, "
            "and name a folder of the merged model alone."
        )


def meant(name: str) -> str:
    """Return what may have been meant: of a hub's name or a folder only what is almost the same."""
    if "/" not in name:
        return nearest(name, [*models(), *TINY])
    return suggestion(name.rpartition("/")[2].lower(), [*models(), *TINY], cutoff=0.8)
