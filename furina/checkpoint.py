"""An adapter on disk: `furina_config.json` and `furina_adapter.safetensors`, strict both ways."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from furina.adapters import AdapterConfig, configure
from furina.errors import AdapterFileError, ConfigurationError
from furina.inject import (
    ModelT,
    adapt,
    adapter_state_dict,
    is_adapted,
    load_adapter_state_dict,
    remove,
    state_of,
)
from furina.storage import atomic_directory, write_json

CONFIG_FILE = "furina_config.json"
TENSOR_FILE = "furina_adapter.safetensors"
FORMAT = "furina-adapter"
FORMAT_VERSION = 1

_KEYS = {
    "format": str,
    "version": int,
    "method": str,
    "options": dict,
    "targets": list,
    "modules": dict,
    "backbone": dict,
}
_SAMPLES = 256


def save(model: nn.Module, path: str | Path) -> None:
    """Write the adapter of `model`, merged or not, to the folder `path`, whole or not at all.

    Raises ConfigurationError if a tensor is not finite, FurinaError if the disk is full.
    """
    state = state_of(model)
    tensors = {name: t.cpu().contiguous() for name, t in adapter_state_dict(model).items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigurationError(f"{name} has NaN or infinite entries: it was not saved.")
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "method": state.config.name,
        "options": state.config.to_dict(),
        "targets": list(state.targets),
        "modules": _module_shapes(model),
        "backbone": _backbone(model),
    }
    with atomic_directory(Path(path), last=CONFIG_FILE) as folder:
        save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt"})
        write_json(folder / CONFIG_FILE, config)


def load(path: str | Path, model: ModelT, check_backbone: bool = True) -> ModelT:
    """Adapt `model` with the adapter saved in `path`; returns the same model.

    Only JSON and safetensors are read, nothing is unpickled. With `check_backbone` a model whose
    weights are not those the adapter was trained on is refused.

    Raises AdapterFileError if the folder is missing, damaged, foreign or for another backbone; the
    model is then unchanged.
    """
    path = Path(path)
    if is_adapted(model):
        raise ConfigurationError("The model already has an adapter: call furina.remove first.")
    saved = read_adapter_config(path)
    config = adapter_config(saved, path)
    tensors = _read_tensors(path)
    _check_same_backbone(path, saved, model, check_backbone)
    try:
        adapt(model, config, targets=saved["targets"], seed=0)
    except ConfigurationError as error:
        raise AdapterFileError(f"The adapter in {path} does not fit this model: {error}") from error
    try:
        if _module_shapes(model) != saved["modules"]:
            raise ConfigurationError("its linears have other names or shapes.")
        load_adapter_state_dict(model, tensors)
    except ConfigurationError as error:
        remove(model)
        raise AdapterFileError(f"The adapter in {path} does not fit this model: {error}") from error
    return model


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """Return the checked content of an adapter folder's config; raises AdapterFileError."""
    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        raise AdapterFileError(
            f"{path} is not a furina adapter folder: it has no {CONFIG_FILE}; pass a folder that "
            "furina.save wrote."
        )
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(f"{file} is damaged ({error}): save the adapter again.") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise AdapterFileError(f"{file} is not the config of a furina adapter: check the path.")
    if saved.get("version") != FORMAT_VERSION:
        raise AdapterFileError(
            f"{file} has format version {saved.get('version')!r}, and this furina reads version "
            f"{FORMAT_VERSION}: use the furina that wrote it."
        )
    wrong = sorted(saved.keys() ^ _KEYS.keys())
    wrong = wrong or [key for key, kind in _KEYS.items() if not isinstance(saved[key], kind)]
    if wrong:
        raise AdapterFileError(
            f"{file} has missing, unknown or mistyped keys {wrong}: save the adapter again."
        )
    return saved


def adapter_config(saved: dict[str, Any], path: str | Path) -> AdapterConfig:
    """Return the method's config stored in an adapter folder; raises AdapterFileError."""
    try:
        return configure(saved["method"], saved["options"])
    except ConfigurationError as error:
        raise AdapterFileError(f"{Path(path) / CONFIG_FILE}: {error}") from error


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return a sha256 over the names, shapes and a fixed sample of the entries of `weights`.

    Samples are rounded to bf16, so that loading the same backbone in fp32 or bf16 agrees.
    """
    digest = hashlib.sha256()
    for name, weight in weights.items():
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / TENSOR_FILE
    if not file.is_file():
        raise AdapterFileError(f"{path} has no {TENSOR_FILE}: save the adapter again.")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{file} is truncated or not a safetensors file ({error}): save or download it again."
        ) from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterFileError(
                f"{file}: {name} holds NaN, infinite or integer entries: save the adapter again."
            )
    return tensors


def _module_shapes(model: nn.Module) -> dict[str, list[int]]:
    layers = state_of(model).layers
    return {name: list(layer.base.weight.shape) for name, layer in layers.items()}


def _backbone(model: nn.Module) -> dict[str, str]:
    state = state_of(model)
    config = getattr(model, "config", None)
    layer = next(iter(state.layers.values()))
    return {
        "model_type": str(getattr(config, "model_type", type(model).__name__)),
        "name": str(getattr(config, "_name_or_path", "")),
        "dtype": str(layer.base.weight.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(
            {name: layer.pristine_weight for name, layer in state.layers.items()}
        ),
    }


def _check_same_backbone(
    path: Path, saved: dict[str, Any], model: nn.Module, check_weights: bool
) -> None:
    modules: dict[str, list[int]] = saved["modules"]
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in modules.items():
        weight = own.get(f"{name}.weight")
        if weight is None or list(weight.shape) != shape:
            found = "no such linear" if weight is None else f"shape {list(weight.shape)}"
            raise AdapterFileError(
                f"The adapter in {path} is for another backbone ({_backbone_name(saved)}): {name} "
                f"should have shape {shape}, and this model has {found}; load that backbone."
            )
    weights = {name: own[f"{name}.weight"] for name in modules}
    if check_weights and fingerprint(weights) != saved["backbone"].get("fingerprint"):
        raise AdapterFileError(
            f"The adapter in {path} was trained on other weights than this model's "
            f"({_backbone_name(saved)}): load that backbone (from "
            "Python, check_backbone=False loads it all the same)."
        )


def _backbone_name(saved: dict[str, Any]) -> str:
    backbone = saved["backbone"]
    return f"{backbone.get('model_type')} {backbone.get('name') or ''}".rstrip()
