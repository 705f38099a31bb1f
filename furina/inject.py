"""Put a method's layers into a Hugging Face causal LM, in place, and take them out again."""

from __future__ import annotations

import fnmatch
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from furina.adapters import AdapterConfig, AdapterLinear, configure
from furina.adapters.sharding import whole, write
from furina.context import ForwardTracker
from furina.errors import ConfigurationError

logger = logging.getLogger("furina")

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a Llama-like block (MixLoRA's and the paper's setting)."""

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
    of itself and leaves the global generator alone. `options` go to the method's config.

    Raises ConfigurationError for an unknown method or option, a target that matches nothing, or a
    match that cannot be adapted: not an nn.Linear, tied, used twice, or in an adapted model.
    """
    config = _config(method, options)
    _require_bare(model)
    patterns = _patterns(targets)
    names = _matching_linears(model, patterns)
    config = config.resolve(names)
    tracker = ForwardTracker()
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        layers = _build(config, model, names, tracker)
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
    for name, layer in state.layers.items():
        if layer.merged:
            layer.unmerge()
        layer.restore_base()
        model.set_submodule(name, layer.base)
    for handle in state.handles:
        handle.remove()
    state.tracker.detach(model)
    del model.__dict__[_STATE]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in state.trainable_before)
    return state


def reattach(model: nn.Module, state: AdaptedState) -> None:
    """Put a detached adapter in again; it follows the mode, device and dtype of its linears.

    Raises ConfigurationError, and changes nothing, if the model is adapted or one of the linears
    was replaced in the meantime.
    """
    _require_bare(model)
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
    state.handles = state.tracker.attach(model)
    model.__dict__[_STATE] = state


def is_adapted(model: nn.Module) -> bool:
    """Return whether `model` carries an adapter, merged or not."""
    return _STATE in model.__dict__


def state_of(model: nn.Module) -> AdaptedState:
    """Return what `adapt` left on `model`; raises ConfigurationError if it is not adapted."""
    if not is_adapted(model):
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

    Raises ConfigurationError naming what is missing, unexpected or of another shape; the adapter
    is then unchanged.
    """
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
    with torch.no_grad():
        for name, tensor in own.items():
            write(tensor, state[name])
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
    return list(groups.values())


def _require_bare(model: nn.Module) -> None:
    if is_adapted(model):
        raise ConfigurationError(
            f"The model already has a {state_of(model).config.name} adapter: call furina.remove "
            "first."
        )


def _config(method: str | AdapterConfig, options: dict[str, Any]) -> AdapterConfig:
    if isinstance(method, str):
        return configure(method, options)
    if options:
        raise ConfigurationError(
            f"Options {sorted(options)} would be ignored: set them in the {method.name} config."
        )
    return method


def _patterns(targets: Sequence[str] | None) -> tuple[str, ...]:
    if targets is None:
        return DEFAULT_TARGETS
    named = not isinstance(targets, str) and all(isinstance(name, str) for name in targets)
    if not targets or not named:
        raise ConfigurationError(
            f'targets must be a list of module names such as ["q_proj", "v_proj"], not {targets!r}.'
        )
    return tuple(targets)


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


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target) or fnmatch.fnmatchcase(name, target)


def _matching_linears(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    modules = dict(model.named_modules(remove_duplicate=False))
    could = f"linears that could match end in: {', '.join(_linear_suffixes(modules))}."
    for target in targets:
        if not any(_matches(name, target) for name in modules):
            raise ConfigurationError(f"Target {target!r} matches no module; {could}")
    matched = [name for name in modules if any(_matches(name, target) for target in targets)]
    module_uses = Counter(id(module) for module in modules.values())
    weight_uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name in matched:
        _check_linear(name, modules[name], module_uses, weight_uses, could)
    return matched


def _check_linear(
    name: str,
    module: nn.Module,
    module_uses: Counter[int],
    weight_uses: Counter[int],
    could: str,
) -> None:
    if type(module) is not nn.Linear:
        raise ConfigurationError(
            f"{name or 'The model itself'} is a {type(module).__name__}, not a plain nn.Linear, so "
            f"it cannot be adapted; {could}"
        )
    if module_uses[id(module)] > 1:
        raise ConfigurationError(
            f"{name} is used in more than one place of the model, so an update would act twice: "
            "leave it out of the targets."
        )
    if weight_uses[id(module.weight)] > 1:
        raise ConfigurationError(
            f"The weight of {name} is tied to another module's, which merging would change too: "
            "leave it out of the targets."
        )


def _linear_suffixes(modules: dict[str, nn.Module]) -> list[str]:
    linears = [name for name, module in modules.items() if type(module) is nn.Linear]
    return sorted({name.rpartition(".")[2] for name in linears}) or ["(no nn.Linear at all)"]


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
