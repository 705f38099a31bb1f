"""Merge an adapter into its backbone, all linears or none, and take it out bit for bit."""

from __future__ import annotations

import hashlib
import warnings
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.adapters import AdapterLinear
from furina.errors import ConfigurationError, NotMergeableError
from furina.model.fingerprint import backbone_entry
from furina.model.state import AdaptedState, require_in_place, require_way_back, state_of

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MergeReport(NamedTuple):
    """How many tensors were merged and how far they moved: max |ΔW| and ‖ΔW‖/‖W‖ over all."""

    num_merged: int
    max_abs_delta: float
    relative_delta: float


def merge(model: nn.Module, keep_base: bool = True) -> MergeReport:
    """Write W + ΔW into every adapted linear; the model's modules are then the plain backbone's.

    ΔW is summed in float64 and rounded once. `keep_base` keeps W on the CPU for `unmerge`; without
    it the copies are dropped once all is merged, and the model is a plain one for good. Each linear
    is then asked for one vector, which its hooks see too. As long as the model is merged,
    `load_state_dict` refuses other weights for the merged linears.

    Raises NotMergeableError with the reason for a method without a fixed update, and
    ConfigurationError if merged already, if a merged weight is not finite, if a linear is gone, or
    if one does not compute its merged weight, as with a hook that changes its output. After these,
    as after any interruption, nothing is changed.
    """
    state = state_of(model)
    mergeable = state.config.mergeability()
    if not mergeable.ok:
        raise NotMergeableError(f"Method {state.config.name} cannot be merged: {mergeable.reason}.")
    if is_merged(model):
        require_way_back(state)
        raise ConfigurationError("The adapter is merged already: call furina.unmerge first.")
    require_in_place(model)
    report = _check(state)
    try:
        for name, layer in state.layers.items():
            layer.merge()
            model.set_submodule(name, layer.base)
            _check_computed(layer)
            _seal(state, layer)
        _guard(model, state)
        # `furina.save` needs it, and W is gone from now on.
        state.backbone = None if keep_base else backbone_entry(model)
    except BaseException:
        _take_out(model, state)
        raise
    if not keep_base:
        for layer in state.layers.values():
            layer.give_up_base()
    return report


def unmerge(model: nn.Module) -> None:
    """Restore every weight bit for bit and put the adapter's layers back.

    After an interruption a second call goes on where it was. Raises ConfigurationError if the model
    is not merged, or was merged with keep_base=False; warns if a merged weight was written to.
    """
    state = state_of(model)
    if not is_merged(model):
        raise ConfigurationError("The adapter is not merged: there is nothing to undo.")
    require_way_back(state)
    require_in_place(model)
    merged = [layer for layer in state.layers.values() if layer.merged]
    changed = [layer.name for layer in merged if _base_changed(state, layer)]
    if changed:
        warnings.warn(
            f"The weight of {changed[0]} was changed after the merge: unmerging restores W, so the "
            "change is lost.",
            stacklevel=2,
        )
    _take_out(model, state)


def is_merged(model: nn.Module) -> bool:
    """Return whether the adapter's update is in the weights now."""
    return any(layer.merged for layer in state_of(model).layers.values())


@torch.no_grad()
def require_unchanged(model: nn.Module) -> None:
    """Raise ConfigurationError if the weights no longer hold the update that the adapter is now.

    A model that is not merged passes, as does one without a way back, which is a plain model.
    """
    state = state_of(model)
    if state.is_final:
        return
    for name, layer in state.layers.items():
        if _base_changed(state, layer) or _adapter_changed(state, layer):
            raise ConfigurationError(
                f"{name} was changed after the merge, so its weight is no longer W and the "
                "adapter's update: call furina.unmerge first, and merge again."
            )


def _take_out(model: nn.Module, state: AdaptedState) -> None:
    """Undo what was merged so far. Interrupted, it leaves a model that still counts as merged."""
    for handle in state.guards:
        handle.remove()
    state.guards.clear()
    for name, layer in state.layers.items():
        model.set_submodule(name, layer)
        if layer.merged:
            layer.unmerge()
    state.seals.clear()


@torch.no_grad()
def _check(state: AdaptedState) -> MergeReport:
    """Compute every merged weight once, before any is written, and refuse NaN and infinity."""
    largest, delta_square, weight_square = 0.0, 0.0, 0.0
    for name, layer in state.layers.items():
        weight = layer.pristine_weight  # refuses a shard
        if layer.base.weight.is_inference() and not torch.is_inference_mode_enabled():
            raise ConfigurationError(
                f"The weight of {name} was made in torch.inference_mode and can be written to in "
                "it alone: merge in it too, or load the backbone outside."
            )
        delta = layer.delta()
        if not layer.merged_weight(delta).isfinite().all():
            raise ConfigurationError(
                f"The merged weight of {name} has NaN or infinite entries: the adapter diverged or "
                "overflows the backbone's dtype; nothing was merged."
            )
        largest = max(largest, delta.abs().max().item())
        delta_square += delta.square().sum().item()
        weight_square += weight.to(torch.float64).square().sum().item()
    relative = (delta_square / weight_square) ** 0.5 if weight_square else float("inf")
    return MergeReport(len(state.layers), largest, relative)


@torch.no_grad()
def _check_computed(layer: AdapterLinear) -> None:
    """Ask the merged linear for one random vector, hooks included: it must be W + ΔW times it."""
    base = layer.base
    x = torch.randn(
        1, 1, base.in_features, generator=torch.Generator().manual_seed(0), device="cpu"
    )
    x = x.to(base.weight)
    expected = functional.linear(x, base.weight, base.bias)  # first: a hook may write the weight
    y = base(x)
    bound = expected.abs().max() * torch.finfo(expected.dtype).eps
    same = isinstance(y, Tensor) and y.shape == expected.shape
    if not same or not ((y - expected).abs() <= bound).all():
        raise ConfigurationError(
            f"{layer.name} does not compute its merged weight: a hook or another function changes "
            "its weight, input or output; take that away first; nothing was merged."
        )


def _guard(model: nn.Module, state: AdaptedState) -> None:
    """Let every module that holds merged linears refuse other weights for them, before any is read.

    The outermost that loads is asked first, so nothing is half loaded.
    """
    below: dict[str, list[str]] = {}
    for name in state.layers:
        parts = name.split(".")
        for depth in range(len(parts) + 1):
            inner = ".".join([*parts[depth:], "weight"])
            below.setdefault(".".join(parts[:depth]), []).append(inner)
    for name, weights in below.items():
        module = model.get_submodule(name)
        hook = partial(_refuse_weights, weights)
        state.guards.append(module.register_load_state_dict_pre_hook(hook))  # type: ignore[no-untyped-call]


def _refuse_weights(
    weights: list[str], module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    for weight in weights:
        if prefix + weight in state_dict:
            raise ConfigurationError(
                f"{prefix}{weight} cannot be loaded into a merged model, which would lose the "
                "adapter's update: call furina.remove first, or load it into a new backbone."
            )


def _seal(state: AdaptedState, layer: AdapterLinear) -> None:
    """Note what the merged weight and the adapter are, to see a later change of either."""
    weight = layer.base.weight
    adapter = _checksum(*layer.adapter_tensors().values())
    state.seals[layer.name] = weight.dtype, _checksum(weight), adapter


def _base_changed(state: AdaptedState, layer: AdapterLinear) -> bool:
    """Tell whether somebody wrote to a merged weight; a model that was cast since is not asked."""
    seal = state.seals.get(layer.name)
    weight = layer.base.weight
    return seal is not None and seal[0] == weight.dtype and seal[1] != _checksum(weight)


def _adapter_changed(state: AdaptedState, layer: AdapterLinear) -> bool:
    seal = state.seals.get(layer.name)
    return seal is not None and seal[2] != _checksum(*layer.adapter_tensors().values())


def _checksum(*tensors: Tensor) -> str:
    """Return a hash over the bits of every row's sum: cheap, and the same on every device."""
    digest = hashlib.sha256()
    for tensor in tensors:
        words = tensor.detach().contiguous().view(_WORDS[tensor.element_size()])
        rows = words.sum(-1, dtype=torch.int64) if words.dim() > 1 else words
        digest.update(rows.cpu().numpy().tobytes())
    return digest.hexdigest()
