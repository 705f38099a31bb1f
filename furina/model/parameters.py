"""An adapted model's parameters: counted, read, loaded, and grouped for an optimiser."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.kernels.sharding import whole, write
from furina.model.state import require_way_back, state_of


class AdapterSummary(NamedTuple):
    """Counts of an adapted model's parameters."""

    method: str
    num_linears: int
    trainable: int
    trainable_without_router: int
    active: int
    total: int


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
    own = set(map(id, adapter_parameters(model).values()))
    beside = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    if beside:
        parameters = {"params": list(beside.values()), "names": list(beside)}
        return [*groups.values(), {**parameters, "lr": learning_rate, "weight_decay": 0.0}]
    return list(groups.values())


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
