"""Adapted models of equal size to compare: ours and peft's, on shared weights, moved from zero."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar

import peft
import torch
from torch import Tensor, nn

import furina
from furina.errors import FurinaError
from furina.model.inject import DEFAULT_TARGETS
from furina.model.state import state_of

LEARNING_RATE = 1e-4
NEAR = 0.1
"""How far, relatively, a linear's update may be from the size asked for."""
Model = TypeVar("Model", bound=nn.Module)


def backbone_of(options: Namespace, attention: str | None = None) -> Any:
    """Load the frozen backbone with as many threads as the options say."""
    torch.set_num_threads(options.threads)
    loaded = furina.load_backbone(options.backbone, options.dtype, options.device, attention)
    return loaded.requires_grad_(False)


def twin(model: Model) -> Model:
    """Return a model with modules of its own that shares every parameter, in training mode."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared).train()


def method_options(method: str, options: Namespace) -> dict[str, Any]:
    """Return a method's options at the total rank asked for, cut into experts if it has them."""
    defaults = {field.name: field.default for field in fields(furina.methods()[method])}
    chosen: dict[str, Any] = {"dropout": getattr(options, "dropout", 0.0), "rank": options.rank}
    if "allocation" in defaults:  # as many experts in every layer
        chosen |= {"rank": options.rank // options.experts, "allocation": [options.experts]}
    elif "num_experts" in defaults:
        chosen |= {"rank": options.rank // options.experts, "num_experts": options.experts}
    if "active_rank" in defaults:  # the default's share of the ranks
        chosen["active_rank"] = options.rank * defaults["active_rank"] // defaults["rank"]
    if "svd_iterations" in defaults:  # only the start is slow
        chosen["svd_iterations"] = 2
    return chosen


def adapt(model: nn.Module, method: str, options: Namespace, **more: Any) -> None:
    """Adapt a model with a method at the total rank asked for; `more` goes to furina.adapt."""
    furina.adapt(model, method, seed=options.seed, **method_options(method, options) | more)


def peft_model(peer: str, model: nn.Module, options: Namespace) -> Any:
    """Return peft's model; its adapter is fp32 unless the variant says bf16."""
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=list(DEFAULT_TARGETS),
        use_dora="dora" in peer,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    cast = not peer.endswith("_bf16")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=cast)


def noises(parameters: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Draw noise as large as each parameter's entries, or of deviation 1/2 for zeros."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [p.detach().square().mean().sqrt().item() or 0.5 for p in parameters]
    return [
        size * torch.randn(parameter.shape, generator=generator).to(parameter)
        for size, parameter in zip(sizes, parameters, strict=True)
    ]


def perturb(model: nn.Module, update: float, seed: int, near: float = NEAR) -> None:
    """Move every entry of the adapter so that each linear's ‖ΔW‖/‖W‖ is about `update`.

    Raises FurinaError for a linear that no size of noise brings there.
    """
    for index, layer in enumerate(state_of(model).layers.values()):
        _perturb(layer, update, seed + index, near)


@torch.no_grad()
def _perturb(layer: furina.adapters.AdapterLinear, update: float, seed: int, near: float) -> None:
    moved = [p for name, p in layer.named_parameters() if not name.startswith("base.")]
    starts = [parameter.detach().clone() for parameter in moved]
    added = noises(moved, seed)
    norm, size = layer.pristine_weight.double().norm().item(), update
    for _ in range(12):
        for parameter, start, noise in zip(moved, starts, added, strict=True):
            parameter.copy_(start + size * noise)
        ratio = layer.delta().norm().item() / norm
        if abs(ratio / update - 1) <= near:
            return
        size *= min(max(update / max(ratio, 1e-12), 0.1), 10)
    raise FurinaError(f"{layer.name}: no perturbation has |ΔW|/|W| near {update:g}.")


def put_in(
    model: nn.Module, method: str, update: float, options: Namespace, near: float = NEAR
) -> None:
    """Load the adapter that the options name, or make one whose every entry is moved."""
    if options.adapter_path:
        furina.load(options.adapter_path, model)
    else:
        adapt(model, method, options)
        perturb(model, update, options.seed, near)


def relative_update(model: nn.Module) -> float:
    """Return ‖ΔW‖/‖W‖ over all adapted linears."""
    square = {"delta": 0.0, "weight": 0.0}
    for layer in state_of(model).layers.values():
        square["delta"] += layer.delta().square().sum().item()
        square["weight"] += layer.pristine_weight.double().square().sum().item()
    return float((square["delta"] / square["weight"]) ** 0.5)
