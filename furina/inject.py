"""Put a method's layers into a Hugging Face causal LM, in place, and take them out again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from furina.adapters import AdapterConfig, AdapterLinear, configure
from furina.adapters.sharding import whole, write
from furina.context import ForwardTracker
from furina.errors import ConfigurationError
from furina.overrides import override
from furina.targets import DEFAULT_TARGETS as DEFAULT_TARGETS
from furina.targets import matching_linears, wrapper

logger = logging.getLogger("furina")

_STATE = "_furina"
ModelT = TypeVar("ModelT", bound=nn.Module)


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


class AdapterSummary(NamedTuple):
    """Counts of an adapted model's parameters."""

    method: str
    num_linears: int
    trainable: int
    trainable_without_router: int
    active: int
    total: int


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
    logger.info(
        "%s: %d linears wrapped, %s trainable of %s parameters",
        *(config.name, len(layers), f"{summary.trainable:,}", f"{summary.total:,}"),
    )
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
    del model.__dict__[_STATE]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trainable_before)


def reattach(model: nn.Module, state: AdaptedState) -> None:
    """Put a detached adapter in again; it follows the mode, device and dtype of its linears.

    Raises ConfigurationError, and changes nothing, if the model is adapted or one of the linears
    was replaced in the meantime.
    """
    if is_adapted(model):
        raise ConfigurationError(_has_adapter(model))
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
    model.__dict__[_STATE] = state


def is_adapted(model: nn.Module) -> bool:
    """Return whether `model` carries an adapter, merged or not."""
    return _STATE in model.__dict__


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
    state: AdaptedState = model.__dict__[_STATE]
    return state


def describe(model: nn.Module) -> AdapterSummary:
    """Count the parameters of an adapted model, with and without the router's."""
    state = state_of(model)
    counts = [
        state.config.count(layer.base.in_features, layer.base.out_features, name)
        for name, layer in state.layers.items()
    ]
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model).values())
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    router = sum(count.router for count in counts)
    return AdapterSummary(
        method=state.config.name,
        num_linears=len(counts),
        trainable=trainable,
        trainable_without_router=trainable - router,
        active=sum(count.active for count in counts),
        total=trainable + frozen,
    )


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the adapter's trainable parameters by their name in the model."""
    return {
        name: tensor
        for name, tensor in _adapter_tensors(model).items()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad
    }


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return detached references to all of the adapter's tensors by their name in the model.

    Of a model that is sharded over several devices it is whole copies, and all must ask for them.
    """
    return {name: whole(tensor.detach()) for name, tensor in _adapter_tensors(model).items()}


def load_adapter_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the adapter, strictly: names and shapes must be the adapter's own.

    Raises ConfigurationError naming what is missing, unexpected, of another shape or not finite,
    or if the adapter is merged; it is then unchanged.
    """
    if any(layer.merged for layer in state_of(model).layers.values()):
        require_way_back(state_of(model))
        raise ConfigurationError(
            "The adapter is merged, and the weights would keep the old one: call furina.unmerge "
            "first."
        )
    own = _adapter_tensors(model)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ConfigurationError(
            f"The tensors are not those of this adapter: {_some('missing', missing)}"
            f"{_some('unexpected', unexpected)}adapt the model with the same method and options."
        )
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ConfigurationError(
                f"{name} has shape {tuple(state[name].shape)} but this adapter's is "
                f"{tuple(tensor.shape)}: adapt the model with the same options."
            )
        if not (tensor.is_meta or state[name].isfinite().all()):
            raise ConfigurationError(f"{name} has NaN or infinite entries: nothing was loaded.")
    with torch.no_grad():
        for name, tensor in own.items():
            write(tensor, state[name])
    state_of(model).tracker.forget()
    for layer in state_of(model).layers.values():
        layer.after_load()


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.0,
    lora_plus_ratio: float = 1.0,
) -> list[dict[str, Any]]:
    """Return optimiser groups: `params`, their `names`, `lr` and `weight_decay`.

    A and routers learn at `learning_rate`; every tensor called `lora_B*`, stacked experts included,
    at `lora_plus_ratio` times that (LoRA+, arXiv 2402.12354); and the method multiplies some by
    factors of its own, as FURINA does for v and LoRA+ for B. Only low-rank factors are decayed.
    What else of the model is trainable, such as an unfrozen head, comes last, at `learning_rate`.
    """
    multipliers = state_of(model).config.learning_rate_multipliers()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in adapter_parameters(model).items():
        leaf = name.rpartition(".")[2]
        factor = multipliers.get(leaf, 1.0) * (lora_plus_ratio if leaf.startswith("lora_B") else 1)
        decay = weight_decay if leaf.startswith("lora_") else 0.0
        group = groups.setdefault(
            (factor, decay),
            {"params": [], "lr": learning_rate * factor, "weight_decay": decay, "names": []},
        )
        group["params"].append(parameter)
        group["names"].append(name)
    own = {id(parameter) for parameter in adapter_parameters(model).values()}
    beside = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    if beside:
        parameters = {"params": list(beside.values()), "names": list(beside)}
        return [*groups.values(), {**parameters, "lr": learning_rate, "weight_decay": 0.0}]
    return list(groups.values())


def require_adaptable(model: nn.Module) -> None:
    """Raise ConfigurationError if `model` has an adapter that can still be taken out."""
    if is_adapted(model) and not state_of(model).is_final:
        raise ConfigurationError(_has_adapter(model))


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


def _has_adapter(model: nn.Module) -> str:
    name = state_of(model).config.name
    return f"The model already has a {name} adapter: call furina.remove first."


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


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def _build(
    config: AdapterConfig, model: nn.Module, names: list[str], tracker: ForwardTracker
) -> dict[str, AdapterLinear]:
    """Build and link the layers; an error leaves the backbone as it was."""
    layers: dict[str, AdapterLinear] = {}
    try:
        for name in names:
            layer = config.build(_linear(model, name), name, tracker)
            layers[name] = layer.train(model.training)
        config.link(layers)
    except BaseException:
        for layer in layers.values():
            layer.restore_base()
        raise
    return layers


def _adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    layers = state_of(model).layers
    return {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.adapter_tensors().items()
    }


def _some(label: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{label} {', '.join(names[:3])}{more}; "
