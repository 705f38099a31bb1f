"""Which backbone an adapter belongs to: what it is called, and a sample of each of its weights.

A sample is every entry of a weight, or 256 of a larger one: one of each of 256 equal parts, and its
name decides which. Two samples agree where no entry differs by more than 2⁻⁷ of itself and 2⁻²⁴,
which is what fp32, bf16 and fp16 make of the same number. A change of a share f of a large weight's
entries is missed with probability (1 − f)²⁵⁶, so that of a few rows of an embedding may be.
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.model.state import is_adapted, state_of

SAMPLES = 256
RELATIVE_TOLERANCE = 2.0**-7
"""Two roundings to bf16 are half a unit of 2⁻⁷ each; those to fp16 and fp32 are smaller."""
ABSOLUTE_TOLERANCE = 2.0**-24
"""The smallest number of fp16, in which smaller ones are lost."""

Sample = tuple[list[int], str]
"""A weight's shape, and its sampled entries in bf16 as base64."""


class Backbone(NamedTuple):
    """What an adapter's files say of its backbone, as `backbone_entry` finds it."""

    entry: dict[str, str | None]
    weights: dict[str, Sample]


def backbone_entry(model: nn.Module) -> Backbone:
    """Return what identifies the backbone of an adapted model, merged or not.

    `entry` holds its `model_type`, the `name` to load it by (see `backbone_name`), the `dtype` of
    the weights and, where it is known, the `checkpoint_dtype` that they are stored in.

    Raises ConfigurationError if a weight is gone (keep_base=False), sharded or on the meta device.
    """
    state = state_of(model)
    config = getattr(model, "config", None)
    pristine = {f"{name}.weight": layer.pristine_weight for name, layer in state.layers.items()}
    stored = getattr(model, "checkpoint_dtype", None)
    entry = {
        "model_type": str(getattr(config, "model_type", type(model).__name__)),
        "name": backbone_name(model),
        "dtype": _name(next(iter(pristine.values())).dtype),
        "checkpoint_dtype": None if stored is None else _name(stored),
    }
    weights = {
        name: _sample(name, pristine.get(name, weight))
        for name, weight in backbone_weights(model).items()
    }
    return Backbone(entry, weights)


def backbone_name(model: nn.Module) -> str:
    """Return what `furina.load_backbone` loads the backbone by, empty where nothing says it.

    Of an asset and a tiny model it is their name, else as in `published_name`.
    """
    return str(getattr(model, "backbone_name", None) or published_name(model))


def published_name(model: nn.Module) -> str:
    """Return what any library loads the backbone by: its name on the hub, or else its folder."""
    origin = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    parts = Path(origin).parts
    if len(parts) > 2 and parts[-2] == "snapshots" and parts[-3].startswith("models--"):
        return parts[-3].removeprefix("models--").replace("--", "/")  # the hub's cache
    return str(Path(origin).resolve()) if origin and Path(origin).is_dir() else origin


def backbone_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the backbone's parameters and persistent buffers by its own names, shared ones once.

    They are the live ones: where an adapter is merged, the weights hold it.
    """
    layers = state_of(model).layers if is_adapted(model) else {}
    added = {f"{name}.{part}" for name, layer in layers.items() for part in layer.adapter_tensors()}
    found: dict[str, Tensor] = {}
    seen = set()
    for live, tensor in model.state_dict(keep_vars=True).items():
        name = live.replace("_orig_mod.", "")  # of a part that was compiled after adapting
        if name in added or not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        module, _, leaf = name.rpartition(".")
        linear = module.removesuffix(".base")
        found[f"{linear}.{leaf}" if linear in layers else name] = tensor
    return found


def difference(
    saved: Mapping[str, Sample], model: nn.Module, without: Collection[str] = ()
) -> str | None:
    """Return how the first weight differs in which a bare model is not the sampled backbone.

    Raises ConfigurationError where the model's weights are not at hand.
    """
    own = backbone_weights(model)
    for name, weight in own.items():
        if name in without:
            continue
        if name not in saved:
            return f"{name} is not among its weights"
        shape, entries = saved[name]
        if list(weight.shape) != shape:
            return f"{name} has shape {list(weight.shape)} and not {shape}"
        if not _agree(_decode(_sample(name, weight)[1]), _decode(entries)):
            return f"{name} has other entries"
    absent = [name for name in saved if name not in own]
    return f"this model has no {absent[0]}" if absent else None


def _agree(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=RELATIVE_TOLERANCE, atol=ABSOLUTE_TOLERANCE, equal_nan=True
    )


def _sample(name: str, weight: Tensor) -> Sample:
    if weight.is_meta:
        raise ConfigurationError(f"{name} is on the meta device, without its values.")
    size = weight.numel()
    count = min(SAMPLES, size)
    draws = struct.unpack(f"<{count}Q", hashlib.shake_256(name.encode()).digest(8 * count))
    places = [(part * size + draw % size) // count for part, draw in enumerate(draws)]
    flat = weight.detach().reshape(-1)
    entries = flat[torch.tensor(places, dtype=torch.long, device=flat.device)]
    data = entries.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return list(weight.shape), base64.b64encode(data).decode()


def _decode(entries: str) -> Tensor:
    data = bytearray(base64.b64decode(entries))
    if not data:
        return torch.empty(0)
    return torch.frombuffer(data, dtype=torch.bfloat16).to(torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
