"""What `adapt` keeps on a model, and what a model must be for the verbs on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from furina.adapters import AdapterConfig, AdapterLinear
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker
from furina.model.targets import wrapper

STATE = "_furina"


@dataclass
class AdaptedState:
    """What `adapt` changed in a model, kept on it so that `remove` can undo it exactly."""

    config: AdapterConfig
    targets: tuple[str, ...]
    layers: dict[str, AdapterLinear]
    tracker: ForwardTracker
    backbone: Any = None
    """What `backbone_entry` said, kept where a merge gives up the backbone's own weights."""
    handles: list[Any] = field(default_factory=list)
    trainable_before: frozenset[str] = frozenset()
    guards: list[Any] = field(default_factory=list)
    """Handles of the hooks that refuse other weights while the model is merged."""
    seals: dict[str, tuple[torch.dtype, str, str]] = field(default_factory=dict)
    """Of each merged linear its dtype and checksums of its weight and its adapter's tensors."""

    @property
    def is_final(self) -> bool:
        """Whether the update is in the weights for good: merged with keep_base=False."""
        return not all(layer.has_pristine_weight for layer in self.layers.values())


def is_adapted(model: nn.Module) -> bool:
    """Return whether `model` carries an adapter, merged or not."""
    return STATE in model.__dict__


def state_of(model: nn.Module) -> AdaptedState:
    """Return what `adapt` left on `model`; raises ConfigurationError if it is not adapted."""
    if not is_adapted(model):
        kind = wrapper(model)
        if kind is not None:
            raise ConfigurationError(
                f"The model is wrapped by {kind}: pass the adapted model that is inside."
            )
        raise ConfigurationError(
            "The model has no adapter: call furina.adapt or furina.load first."
        )
    state: AdaptedState = model.__dict__[STATE]
    return state


def require_adaptable(model: nn.Module) -> None:
    """Raise ConfigurationError if `model` has an adapter that can still be taken out."""
    if is_adapted(model) and not state_of(model).is_final:
        raise ConfigurationError(already_adapted(model))


def require_way_back(state: AdaptedState) -> None:
    """Raise ConfigurationError if the update is in the weights for good."""
    if state.is_final:
        raise ConfigurationError(
            "The adapter was merged with keep_base=False, so W is gone: go on with the merged "
            "model, which furina.adapt adapts anew, or load the backbone again."
        )


def require_in_place(model: nn.Module) -> None:
    """Raise ConfigurationError if `model` has lost a layer of the adapter or its linear."""
    state = state_of(model)
    for name, layer in state.layers.items():
        try:
            found: nn.Module | None = model.get_submodule(name)
        except AttributeError:
            found = None
        if found is not layer and found is not layer.base:
            raise ConfigurationError(
                f"{name} was replaced or taken away after the {state.config.name} adapter was "
                "made: put it back, or load the backbone and the adapter again."
            )


def already_adapted(model: nn.Module) -> str:
    """Say that the model has an adapter that must go first."""
    name = state_of(model).config.name
    return f"The model already has a {name} adapter: call furina.remove first."
