"""An adapter on disk: `furina_config.json` and `furina_adapter.safetensors`, strict both ways.

The tensors are the adapter's and, whole, whatever else of the model was trained beside it; the
file's metadata hold the fingerprint of the rest. The config has the checksum of both files. Version
1 had neither checksums nor trained weights, and fingerprinted the adapted linears alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from furina.errors import AdapterFileError, ConfigurationError
from furina.model.also_trained import also_trained, borrow
from furina.model.config_file import (
    CONFIG_FILE,
    FORMAT,
    FORMAT_VERSION,
    TENSOR_FILE,
    adapter_config,
    config_checksum,
    read_adapter_config,
)
from furina.model.fingerprint import SAMPLES, backbone_entry, backbone_weights, difference
from furina.model.inject import ModelT, adapt, remove
from furina.model.merging import require_unchanged
from furina.model.parameters import adapter_state_dict, load_adapter_state_dict
from furina.model.state import require_adaptable, state_of
from furina.storage import atomic_directory, sha256_file, write_json

_FINGERPRINT = "backbone_weights"
"""The fingerprint's key in the tensor file's metadata."""


def save(model: nn.Module, path: str | Path) -> None:
    """Write the adapter of `model`, merged or not, to the folder `path`, whole or not at all.

    Other parameters that are trainable now, such as an unfrozen head, are saved with it.

    Raises ConfigurationError if a tensor is not finite or the weight of an adapted linear is
    trainable itself, FurinaError if the disk is full.
    """
    state = state_of(model)
    require_unchanged(model)
    backbone = state.backbone or backbone_entry(model)
    others = also_trained(model)
    tensors = adapter_state_dict(model) | {name: weight.detach() for name, weight in others.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigurationError(f"{name} has NaN or infinite entries: it was not saved.")
    weights = {name: one for name, one in backbone.weights.items() if name not in others}
    metadata = {_FINGERPRINT: json.dumps(weights)}  # one: of several the order is not fixed
    config = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "method": state.config.name,
        "options": state.config.to_dict(),
        "targets": list(state.targets),
        "modules": _module_shapes(model),
        "backbone": backbone.entry,
        "also_trained": list(others),
    }
    with atomic_directory(Path(path), last=CONFIG_FILE) as folder:
        save_file(tensors, folder / TENSOR_FILE, metadata=metadata)
        config["tensors_sha256"] = sha256_file(folder / TENSOR_FILE)
        write_json(folder / CONFIG_FILE, {**config, "sha256": config_checksum(config)})


@overload
def load(model: ModelT, path: str | Path, check_backbone: bool = True) -> ModelT: ...
@overload
def load(path: str | Path, model: ModelT, check_backbone: bool = True) -> ModelT: ...
def load(*given: Any, **named: Any) -> Any:
    """Adapt `model` with the adapter saved in `path`, in either order; returns the same model.

    Only JSON and safetensors are read, nothing is unpickled. With `check_backbone` a model whose
    weights are not those the adapter was trained on is refused; see `furina.model.fingerprint` for
    the tolerance. Weights that were trained beside the adapter take the place of the model's, which
    `furina.remove` puts back.

    Raises AdapterFileError if the folder is missing, damaged, foreign or for another backbone; the
    model is then unchanged.
    """
    check_backbone = named.pop("check_backbone", given[2] if len(given) == 3 else True)
    values = [*given[:2], *named.values()]
    models = [value for value in values if isinstance(value, nn.Module)]
    folders = [value for value in values if isinstance(value, str | Path)]
    known = len(given) <= 3 and named.keys() <= {"model", "path"}
    if not known or len(values) != 2 or len(models) != 1 or len(folders) != 1:
        raise ConfigurationError("Call furina.load with a model and the folder of an adapter.")
    return _load(models[0], Path(folders[0]), check_backbone)


def _load(model: ModelT, path: Path, check_backbone: bool) -> ModelT:
    require_adaptable(model)
    saved = read_adapter_config(path)
    config = adapter_config(saved, path)
    tensors, fingerprint = _read_tensors(path, saved)
    others = {name: tensors.pop(name) for name in saved["also_trained"]}
    _check_shapes(path, saved, model, others)
    if check_backbone:
        _check_weights(path, saved, model, fingerprint)
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
    borrow(model, others)
    return model


def _read_tensors(path: Path, saved: Mapping[str, Any]) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors and the backbone's fingerprint; raises AdapterFileError."""
    file = path / TENSOR_FILE
    try:
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            fingerprint = json.loads((opened.metadata() or {}).get(_FINGERPRINT, "{}"))
        changed = "tensors_sha256" in saved and sha256_file(file) != saved["tensors_sha256"]
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterFileError(
            f"{file} is truncated or not a safetensors file ({error}): save or download it again."
        ) from error
    if changed:
        raise AdapterFileError(
            f"{file} is not as furina.save wrote it, by its checksum: copy or download it again."
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise AdapterFileError(
                f"{file}: {name} holds NaN, infinite or integer entries: save the adapter again."
            )
    absent = [name for name in saved["also_trained"] if name not in tensors]
    if absent:
        raise AdapterFileError(f"{file} lacks {absent[0]}: save the adapter again.")
    return tensors, fingerprint


def _module_shapes(model: nn.Module) -> dict[str, list[int]]:
    layers = state_of(model).layers
    return {name: list(layer.base.weight.shape) for name, layer in layers.items()}


def _check_shapes(
    path: Path, saved: Mapping[str, Any], model: nn.Module, others: Mapping[str, Tensor]
) -> None:
    own = dict(model.named_parameters(remove_duplicate=False))
    for name, shape in saved["modules"].items():
        weight = own.get(f"{name}.weight")
        if weight is None or list(weight.shape) != shape:
            found = "no such linear" if weight is None else f"shape {list(weight.shape)}"
            raise AdapterFileError(
                f"The adapter in {path} is for another backbone ({_backbone_name(saved)}): {name} "
                f"should have shape {shape}, and this model has {found}; load that backbone."
            )
    weights = backbone_weights(model)
    for name, value in others.items():
        if name not in weights or weights[name].shape != value.shape:
            found = f"shape {list(own[name].shape)}" if name in own else "none of its own"
            raise AdapterFileError(
                f"The adapter in {path} was trained together with {name} of shape "
                f"{list(value.shape)}, and this model has {found}: give it that shape first, as "
                "model.resize_token_embeddings does."
            )


def _check_weights(
    path: Path, saved: Mapping[str, Any], model: nn.Module, fingerprint: Any
) -> None:
    try:
        if saved["version"] == 1:
            found = _first_fingerprint(model, saved["modules"])
            same = found == saved["backbone"].get("fingerprint")
            why = None if same else "an adapted linear has other entries"
        else:
            why = difference(fingerprint, model, saved["also_trained"])
    except ConfigurationError as error:
        raise AdapterFileError(
            f"Whether the adapter in {path} is for this model cannot be said: {error} Load its "
            "weights first, or pass check_backbone=False."
        ) from error
    except (TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{path / TENSOR_FILE} has a damaged fingerprint ({error}): save the adapter again."
        ) from error
    if why is not None:
        raise AdapterFileError(
            f"The adapter in {path} was trained on other weights than this model's "
            f"({_backbone_name(saved)}), {why}: load that backbone (from Python, "
            "check_backbone=False loads it all the same)."
        )


def _first_fingerprint(model: nn.Module, linears: Iterable[str]) -> str:
    """Return the sha256 that version 1 compared: of evenly spaced entries of adapted linears."""
    digest = hashlib.sha256()
    for name in linears:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise ConfigurationError(f"{name} is on the meta device, without its values.")
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _backbone_name(saved: Mapping[str, Any]) -> str:
    backbone = saved["backbone"]
    return f"{backbone.get('model_type')} {backbone.get('name') or ''}".rstrip()
