"""The config of an adapter's folder, which is read and checked without torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furina.errors import AdapterFileError, ConfigurationError
from furina.options.registry import registry

if TYPE_CHECKING:
    from furina.adapters import AdapterConfig

CONFIG_FILE = "furina_config.json"
TENSOR_FILE = "furina_adapter.safetensors"
FORMAT = "furina-adapter"
FORMAT_VERSION = 2
READABLE = (1, 2)
"""The versions of adapter folders that `load` reads."""

_KEYS = {
    "format": str,
    "version": int,
    "method": str,
    "options": dict,
    "targets": list,
    "modules": dict,
    "backbone": dict,
    "also_trained": list,
    "tensors_sha256": str,
    "sha256": str,
}
_NEW_IN_2 = {"also_trained", "tensors_sha256", "sha256"}


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """Return the checked content of an adapter folder's config; raises AdapterFileError."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise AdapterFileError(
            f"{path} is not a furina adapter folder: "
            f"{f'it has no {CONFIG_FILE}' if Path(path).exists() else 'there is no such folder'}; "
            "pass a folder that furina.save wrote."
        )
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} is damaged ({error}): save the adapter again.") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise AdapterFileError(f"{file} is not the config of a furina adapter: check the path.")
    version = saved.get("version")
    if isinstance(version, bool) or version not in READABLE:
        raise AdapterFileError(
            f"{file} has format version {version!r}, and this furina reads versions "
            f"{' and '.join(map(str, READABLE))}: use the furina that wrote it."
        )
    expected = _KEYS.keys() if version == 2 else _KEYS.keys() - _NEW_IN_2
    wrong = sorted(saved.keys() ^ expected)
    wrong = wrong or [key for key in expected if not isinstance(saved[key], _KEYS[key])]
    if wrong:
        raise AdapterFileError(
            f"{file} has missing, unknown or mistyped keys {wrong}: save the adapter again."
        )
    if version == 2 and saved["sha256"] != config_checksum(saved):
        raise AdapterFileError(
            f"{file} is not as furina.save wrote it, by its checksum: copy or save it again."
        )
    if not (Path(path) / TENSOR_FILE).is_file():
        raise AdapterFileError(f"{path} has no {TENSOR_FILE}: save the adapter again.")
    return {"also_trained": []} | saved


def config_checksum(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a config's content, whatever its layout, but for the checksum itself."""
    content = {key: value for key, value in config.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def adapter_config(saved: dict[str, Any], path: str | Path) -> AdapterConfig:
    """Return the method's config stored in an adapter folder; raises AdapterFileError.

    Where torch is not loaded it builds no layers; see `furina.options.registry`.
    """
    try:
        config: AdapterConfig = registry().configure(saved["method"], saved["options"])
        return config
    except ConfigurationError as error:
        raise AdapterFileError(f"{Path(path) / CONFIG_FILE}: {error}") from error
