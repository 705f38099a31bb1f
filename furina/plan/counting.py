"""What a micro-batch multiplies and holds, counted operation by operation on the meta device.

Two and three decoder layers are run without their weights, and the others taken to cost what the
third does; where a method does not treat all layers alike, all are run. A micro-batch of T tokens
in rows of L, of which N are answers, costs

    a + b·T + c·T·L + d·N

FLOPs, and as many bytes with other factors: four shapes are counted, and the factors follow. Only
matrix products count as FLOPs. Where the peak of another shape lies in another phase of the step,
the bytes are some percent too many. A method is never asked what it does, so a new one is counted.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from furina.adapters import AdapterConfig, configure
from furina.backbones.load import meta_backbone
from furina.errors import ConfigurationError
from furina.model.accumulation import accumulating
from furina.model.auxiliary import auxiliary_loss
from furina.model.inject import adapt, remove
from furina.model.parameters import adapter_parameters, adapter_state_dict
from furina.model.state import state_of
from furina.training.loss import AnswerBatch, answer_loss

FULL = 4
"""Bytes of an fp32 number, in which parameters are trained."""
EAGER, FUSED = "eager", "furina_fused"
"""How attention is counted: with its scores kept, or as one kernel that keeps none."""


class Shape(NamedTuple):
    """A micro-batch: rows of so many tokens, and the answer tokens of each."""

    rows: int
    length: float
    answers: float

    @property
    def terms(self) -> tuple[float, ...]:
        """What costs are proportional to."""
        tokens = self.rows * self.length
        return 1.0, tokens, tokens * self.length, self.rows * self.answers


SHAPES = (Shape(2, 128, 1), Shape(4, 128, 1), Shape(2, 256, 1), Shape(2, 128, 16))
"""The micro-batches that are counted."""


class Cost(NamedTuple):
    """FLOPs or bytes of a micro-batch, by the factors of `Shape.terms`."""

    factors: tuple[float, ...]

    def of(self, shape: Shape) -> int:
        """Return the cost of a micro-batch."""
        return max(0, round(sum(f * t for f, t in zip(self.factors, shape.terms, strict=True))))


@dataclass(frozen=True)
class Adapted:
    """What a method puts into a backbone.

    Attributes:
        config: its options, with what follows from the backbone filled in.
        linears: names of what its targets match.
        trainable: parameters that learn.
        kept: numbers beside them that do not.
        alike: whether every decoder layer has tensors of the same shapes.
    """

    config: AdapterConfig
    linears: tuple[str, ...]
    trainable: int
    kept: int
    alike: bool


@dataclass(frozen=True)
class Method:
    """A method with its options (JSON) and targets, as a key of what was counted."""

    name: str
    options: str
    targets: tuple[str, ...] | None


class Training(NamedTuple):
    """FLOPs of the forward of training, and of forward and backward; bytes held at their peak.

    The bytes are those beside the weights, the parameters and their gradients.
    """

    forward: Cost
    step: Cost
    peak: Cost


class Reading(NamedTuple):
    """FLOPs of a forward in evaluation; bytes held at its peak beside weights and adapter."""

    forward: Cost
    peak: Cost


@cache
def parameters_of(backbone: str) -> int:
    """Return a backbone's parameters, a tied output embedding counted once."""
    return sum(parameter.numel() for parameter in _whole(backbone).parameters())


@cache
def cached_numbers(backbone: str) -> int:
    """Return how many numbers the keys and values of one token are."""
    ids = torch.zeros(1, 1, dtype=torch.long, device="meta")
    model = meta_backbone(backbone)
    model.set_attn_implementation(FUSED)
    with torch.no_grad():
        kept = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    layers = kept.past_key_values.layers
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers)


@cache
def adapted_of(backbone: str, method: Method) -> Adapted:
    """Return what a method adapts.

    Raises ConfigurationError where its options or targets do not fit the backbone.
    """
    model = _whole(backbone)
    _adapt(model, method)
    try:
        tensors = adapter_state_dict(model)
        trainable = sum(tensor.numel() for tensor in adapter_parameters(model).values())
        kept = sum(tensor.numel() for tensor in tensors.values()) - trainable
        shapes = [
            sorted(
                (name.removeprefix(prefix), *each.shape)
                for name, each in tensors.items()
                if name.startswith(prefix)
            )
            for prefix in _prefixes(model)
        ]
        linears = tuple(state_of(model).layers)
        alike = all(each == shapes[0] for each in shapes)
        return Adapted(state_of(model).config, linears, trainable, kept, alike)
    finally:
        remove(model)


@cache
def training(
    backbone: str,
    method: Method,
    dtype: str,
    attention: str,
    checkpointing: bool = False,
    accumulates: bool = False,
) -> Training:
    """Count a micro-batch of training; `accumulates` is whether an optimiser step has several."""

    def count(model: PreTrainedModel, shape: Shape) -> tuple[int, ...]:
        if checkpointing and not model.is_activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        for parameter in adapter_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        batch = batch_of(model, shape)
        shared = accumulating(model) if accumulates else nullcontext()
        with Count(model.train()) as counted, shared:
            loss = answer_loss(model, batch)[0] + auxiliary_loss(model)
            forward = counted.flops
            loss.backward()  # type: ignore[no-untyped-call]
        return forward, counted.flops, counted.peak

    return Training(*_costs(backbone, dtype, attention, method, count))


@cache
def reading(backbone: str, method: Method | None, dtype: str) -> Reading:
    """Count a micro-batch of evaluation, with a method's adapter or none."""

    def count(model: PreTrainedModel, shape: Shape) -> tuple[int, ...]:
        batch = batch_of(model, shape)
        nn.Module.eval(model)
        with torch.no_grad(), Count(model) as counted:
            answer_loss(model, batch)
        return counted.flops, counted.peak

    return Reading(*_costs(backbone, dtype, FUSED, method, count))


def batch_of(model: nn.Module, shape: Shape) -> AnswerBatch:
    """Return rows of token 0 on the model's device, whose last tokens are the answer."""
    rows, length, answers = (int(each) for each in shape)
    device = next(model.parameters()).device
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    ends = torch.arange(length - answers - 1, length - 1, device=device)
    starts = length * torch.arange(rows, device=device)[:, None]
    targets = torch.zeros(rows * answers, dtype=torch.long, device=device)
    return AnswerBatch(inputs, (starts + ends).flatten(), targets, rows * length)


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the FLOPs of matrix products, and follow the bytes of what operations make.

    Torch's own FlopCounterMode holds on to tensors that recomputation would have given up.
    """

    def __init__(self, model: nn.Module) -> None:
        """Leave out the bytes of the model's tensors, and of the gradients that it has."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: int = 0
        self.bytes = self.peak = 0
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [p.grad for p in model.parameters() if p.grad is not None]
        self._known = {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count it."""
        made = function(*args, **(kwargs or {}))
        formula = _FLOPS.get(function._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return made

    def _follow(self, storage: Any) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.bytes -= size


def _costs(
    backbone: str,
    dtype: str,
    attention: str,
    method: Method | None,
    count: Callable[[PreTrainedModel, Shape], tuple[int, ...]],
) -> list[Cost]:
    """Return the factors of each number that `count` gives, for all of the backbone's layers."""
    depth = len(_stack(_whole(backbone)))
    alike = method is None or adapted_of(backbone, method).alike
    counted = {}
    for layers in (2, 3) if alike and depth > 3 else (depth,):
        model = _cut(backbone, dtype, layers)
        if method is not None:
            _adapt(model, method)
        model.set_attn_implementation(attention)
        counted[layers] = np.array([count(model, shape) for shape in SHAPES], dtype=np.float64)
    every = counted.get(depth)
    if every is None:
        every = counted[2] + (depth - 2) * (counted[3] - counted[2])
    factors = np.linalg.solve(np.array([shape.terms for shape in SHAPES]), every)
    return [Cost(tuple(column)) for column in factors.T.tolist()]


@cache
def _whole(backbone: str) -> PreTrainedModel:
    return meta_backbone(backbone)


def _cut(backbone: str, dtype: str, layers: int) -> PreTrainedModel:
    """Return the first layers of a backbone, and what is around them."""
    model = meta_backbone(backbone, dtype).requires_grad_(False)
    del _stack(model)[layers:]
    model.config.get_text_config(decoder=True).num_hidden_layers = layers
    return model


def _stack(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers; raises ConfigurationError where they are not one list."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not found:
        raise ConfigurationError(
            f"A backbone of type {model.config.model_type} cannot be planned for: its decoder "
            "layers are not one list."
        )
    return found[0]


def _prefixes(model: PreTrainedModel) -> list[str]:
    stack = _stack(model)
    name = next(name for name, module in model.named_modules() if module is stack)
    return [f"{name}.{index}." for index in range(len(stack))]


def _adapt(model: PreTrainedModel, method: Method) -> None:
    config = configure(method.name, json.loads(method.options))
    try:
        adapt(model, config, targets=method.targets, seed=0)
    except (NotImplementedError, RuntimeError) as error:
        raise ConfigurationError(
            f"Method {method.name} cannot be planned for, since it looks at weights when it is "
            f"built ({error}): let it pass tensors on the meta device."
        ) from error


def _product(added: Tensor, left: Tensor, right: Tensor, **_: Any) -> int:
    return 2 * math.prod(left.shape) * right.shape[-1]


# Torch counts addmm and baddbmm, but not these.
_IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}
_FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, **_IN_PLACE}


def _fused(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attend as a kernel does that keeps no scores. Shape: (B, heads, L, w) → (B, L, heads, w)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    return attend(query, key, value, 0.0, True)[0].transpose(1, 2).contiguous(), None


# By a name of its own, since transformers' masks for its fused kernels look at values.
AttentionInterface.register(FUSED, _fused)
AttentionMaskInterface.register(FUSED, lambda *_, **__: None)
