"""Merge an adapter into its backbone, all linears or none, and take it out bit for bit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError, NotMergeableError
from furina.inject import AdaptedState, state_of


class MergeReport(NamedTuple):
    """How many tensors were merged and how far they moved: max |ΔW| and ‖ΔW‖/‖W‖ over all."""

    num_merged: int
    max_abs_delta: float
    relative_delta: float


def merge(model: nn.Module, keep_base: bool = True) -> MergeReport:
    """Write W + ΔW into every adapted linear; the model's modules are then the plain backbone's.

    ΔW is summed in float64 and rounded once. `keep_base` keeps W on the CPU for `unmerge`; without
    it the copy is saved and unmerging is an error.

    Raises NotMergeableError with the reason for a method without a fixed update, and
    ConfigurationError if merged already or if a merged weight is not finite; nothing is changed
    then.
    """
    state = state_of(model)
    mergeable = state.config.mergeability()
    if not mergeable.ok:
        raise NotMergeableError(f"Method {state.config.name} cannot be merged: {mergeable.reason}.")
    if is_merged(model):
        raise ConfigurationError("The adapter is merged already: call furina.unmerge first.")
    report = _check(state)
    for name, layer in state.layers.items():
        layer.merge(keep_base)
        model.set_submodule(name, layer.base)
    merged = sum(layer.merged for layer in state.layers.values())
    if merged != len(state.layers):
        raise NotMergeableError(f"Only {merged} of {len(state.layers)} linears were merged.")
    return report


def unmerge(model: nn.Module) -> None:
    """Restore every weight bit for bit and put the adapter's layers back.

    Raises ConfigurationError if the model is not merged, or was merged with keep_base=False.
    """
    state = state_of(model)
    if not is_merged(model):
        raise ConfigurationError("The adapter is not merged: there is nothing to undo.")
    for name, layer in state.layers.items():
        layer.unmerge()
        model.set_submodule(name, layer)


def is_merged(model: nn.Module) -> bool:
    """Return whether the adapter's update is in the weights now."""
    return all(layer.merged for layer in state_of(model).layers.values())


@torch.no_grad()
def _check(state: AdaptedState) -> MergeReport:
    """Compute every merged weight once, before any is written, and refuse NaN and infinity."""
    largest, delta_square, weight_square = 0.0, 0.0, 0.0
    for name, layer in state.layers.items():
        weight = layer.pristine_weight  # refuses a shard
        delta = layer.delta()
        _check_finite(name, layer.merged_weight(delta))
        largest = max(largest, delta.abs().max().item())
        delta_square += delta.square().sum().item()
        weight_square += weight.to(torch.float64).square().sum().item()
    relative = (delta_square / weight_square) ** 0.5 if weight_square else float("inf")
    return MergeReport(len(state.layers), largest, relative)


def _check_finite(name: str, weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ConfigurationError(
            f"The merged weight of {name} has NaN or infinite entries: the adapter diverged or "
            "overflows the backbone's dtype; nothing was merged."
        )
