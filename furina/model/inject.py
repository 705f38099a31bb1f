"""Put a method's layers into a Hugging Face causal LM, in place, and take them out again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from furina.adapters import AdapterConfig, AdapterLinear, configure
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker
from furina.model.overrides import override
from furina.model.parameters import describe
from furina.model.state import (
    STATE,
    AdaptedState,
    already_adapted,
    is_adapted,
    require_adaptable,
    require_in_place,
    require_way_back,
    state_of,
)
from furina.model.targets import DEFAULT_TARGETS as DEFAULT_TARGETS
from furina.model.targets import matching_linears

logger = logging.getLogger("furina")

ModelT = TypeVar("ModelT", bound=nn.Module)


def adapt(
    model: ModelT,
    method: str | AdapterConfig = "furina",
    *,
    targets: Sequence[str] | None = None,
    seed: int | None = None,
    **options: Any,
) -> ModelT:
    """Freeze `model` and wrap its target linears with `method`; returns the same model.

    `targets` are module names, their last parts ("q_proj") or globs ("model.layers.[0-3].*_proj");
    default: the seven linears of a Llama-like block. `seed` makes the initial adapter a function
    of itself and leaves the global generator alone. `options` go to the method's config. A model
    that was merged with keep_base=False is a plain one, and is adapted anew.

    Train the model with `furina.FinetuneModule` or a loop of your own. A transformers Trainer needs
    save_strategy="no" and `furina.save` at its end, and leaves the auxiliary loss out.

    Raises ConfigurationError for an unknown method or option, a target that matches nothing, or a
    match that cannot be adapted: no plain nn.Linear, tied, used twice, wrapped, offloaded, with a
    weight or forward that is not its own, or in an adapted model. Warns where the model has fused
    experts, which stay as they are.
    """
    config = _config(method, options)
    require_adaptable(model)
    patterns, names = matching_linears(model, targets)
    config = config.resolve(names)
    tracker = ForwardTracker()
    # What is made in inference mode could never be trained; a backbone made there cannot anyway.
    inference = torch.is_inference_mode_enabled() and any(
        p.is_inference() for p in model.parameters()
    )
    with torch.inference_mode(inference), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        layers = _build(config, model, names, tracker)
    if is_adapted(model):
        _forget(model)
    _attach(model, AdaptedState(config, patterns, layers, tracker))
    summary = describe(model)
    trained, total = f"{summary.trainable:,}", f"{summary.total:,}"
    said = "%s: %d linears wrapped, %s trainable of %s parameters"
    logger.info(said, config.name, len(layers), trained, total)
    return model


def remove(model: ModelT) -> ModelT:
    """Take the adapter out, merged or not; the backbone is the very same again, bit for bit.

    Raises ConfigurationError if the model was merged with keep_base=False.
    """
    detach(model)
    return model


def detach(model: nn.Module) -> AdaptedState:
    """Do what `remove` does, and return what `reattach` needs to put the adapter in again."""
    state = state_of(model)
    require_way_back(state)
    require_in_place(model)
    for name, layer in state.layers.items():
        if layer.merged:
            layer.unmerge()
        layer.restore_base()
        model.set_submodule(name, layer.base)
    _forget(model)
    return state


def _forget(model: nn.Module) -> None:
    """Take the hooks and the state off the model, whose linears are its own again."""
    state = state_of(model)
    for handle in (*state.handles, *state.guards):
        handle.remove()
    state.guards.clear()
    state.seals.clear()
    state.tracker.detach(model)
    del model.__dict__[STATE]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trainable_before)


def reattach(model: nn.Module, state: AdaptedState) -> None:
    """Put a detached adapter in again; it follows the mode, device and dtype of its linears.

    Raises ConfigurationError, and changes nothing, if the model is adapted or one of the linears
    was replaced in the meantime.
    """
    if is_adapted(model):
        raise ConfigurationError(already_adapted(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in state.layers.items():
        if modules.get(name) is not layer.base:
            raise ConfigurationError(
                f"{name} is no longer the linear that the {state.config.name} adapter was made "
                "for: load the adapter again."
            )
    for layer in state.layers.values():
        layer.follow_base()
        layer.change_base()
    _attach(model, state)


def _attach(model: nn.Module, state: AdaptedState) -> None:
    """Freeze the bare `model` and put the layers in."""
    state.trainable_before = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    model.requires_grad_(False)
    for name, layer in state.layers.items():
        model.set_submodule(name, layer)
    state.handles = [*state.tracker.attach(model), *override(model, state.tracker)]
    model.__dict__[STATE] = state


def _config(method: str | AdapterConfig, options: dict[str, Any]) -> AdapterConfig:
    if isinstance(method, str):
        return configure(method, options)
    if not isinstance(method, AdapterConfig):
        raise ConfigurationError(
            f"method must be the name of a method or a config of furina's, not a "
            f"{type(method).__name__}."
        )
    if options:
        raise ConfigurationError(
            f"Options {sorted(options)} would be ignored: set them in the {method.name} config."
        )
    return method


def _build(
    config: AdapterConfig, model: nn.Module, names: list[str], tracker: ForwardTracker
) -> dict[str, AdapterLinear]:
    """Build and link the layers; an error leaves the backbone as it was."""
    layers: dict[str, AdapterLinear] = {}
    try:
        for name in names:
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            layers[name] = config.build(base, name, tracker).train(model.training)
        config.link(layers)
    except BaseException:
        for layer in layers.values():
            layer.restore_base()
        raise
    return layers
