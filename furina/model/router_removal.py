"""The paper's control: a mixture whose router is simply taken away (table 7)."""

from __future__ import annotations

from typing import TypeGuard, TypeVar

from torch import nn

from furina.adapters import AdapterConfig
from furina.adapters.routing import RoutedConfig
from furina.errors import ConfigurationError
from furina.model.also_trained import also_trained, borrow
from furina.model.inject import adapt, remove
from furina.model.merging import is_merged
from furina.model.parameters import adapter_state_dict, load_adapter_state_dict
from furina.model.state import state_of

ModelT = TypeVar("ModelT", bound=nn.Module)


def has_router(config: AdapterConfig) -> TypeGuard[RoutedConfig]:
    """Return whether a method has a router that could be removed."""
    return isinstance(config, RoutedConfig)


def without_router(model: ModelT) -> ModelT:
    """Replace a trained mixture by the plain average of its experts; returns the same model.

    What is left merges, and is what a routed method gives when its router cannot be served. It is
    not the trained model: nothing else in furina averages experts.

    Raises ConfigurationError for a method without a router, or a merged model.
    """
    state = state_of(model)
    config = state.config
    if not has_router(config):
        raise ConfigurationError(f"Method {config.name} has no router that could be removed.")
    if is_merged(model):
        raise ConfigurationError("The adapter is merged: call furina.unmerge first.")
    tensors = adapter_state_dict(model)
    others = {name: weight.detach().clone() for name, weight in also_trained(model).items()}
    adapt(remove(model), config.without_router(), targets=state.targets, seed=0)
    load_adapter_state_dict(model, {name: tensors[name] for name in adapter_state_dict(model)})
    borrow(model, others)
    return model
