"""The quantised case of error.py: an adapter beside a quantised base, or quantised after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import furina
from benchmarks.common.command import Report
from benchmarks.merging import measures
from furina.model.state import state_of

Texts = tuple[Sequence[Sequence[int]], int]
"""Token ids, and how many of the texts are read at a time."""
Reading = tuple[list[Tensor], Tensor]
"""Every adapted linear's effective weight, and logits."""


def quantise_cases(
    model: Any, exact: Tensor, every: Sequence[int], group: int, texts: Texts
) -> list[Report]:
    """Compare the adapter beside a quantised base with the merged weights quantised.

    That for each number of bits; `exact` are the unmerged model's logits in float64.
    """
    whole = effective_weights(model)
    beside = {bits: read(model, bits, group, texts) for bits in every}
    furina.merge(model)
    after = {bits: read(model, bits, group, texts) for bits in every}
    furina.unmerge(model)
    return [{"bits": bits, **compare(beside[bits], after[bits], (whole, exact))} for bits in every]


def read(model: Any, bits: int, group: int, texts: Texts) -> Reading:
    """Return a model's effective weights and its logits while what it stores is quantised."""
    with quantised(model, bits, group):
        return effective_weights(model), measures.logits(model, *texts)


def compare(beside: Reading, after: Reading, exact: Reading) -> Report:
    """Return how far both are from what is exact, and from one another."""
    pairs = {"beside": (beside, exact), "after": (after, exact), "apart": (after, beside)}
    found: Report = {"weights": {}, "logits": {}}
    for name, ((weights, logits), (other_weights, other_logits)) in pairs.items():
        both = zip(weights, other_weights, strict=True)
        found["weights"][name] = measures.weight_difference(both)
        found["logits"][name] = measures.logit_difference(logits, other_logits, exact[1])
    return found


def effective_weights(model: nn.Module) -> list[Tensor]:
    """Return what each adapted linear multiplies with: W + ΔW, or what is stored if merged.

    In float32, which is enough beside the error of quantising and takes half the memory.
    """
    return [
        (layer.base.weight.detach().double() + (0 if layer.merged else layer.delta())).float()
        for layer in state_of(model).layers.values()
    ]


@torch.no_grad()
def quantise(weight: Tensor, bits: int, group: int) -> Tensor:
    """Round to the nearest whole number of steps, the largest entry being 2^(bits−1) − 1 of them.

    Each group of `group` neighbours in a row has a step of its own; the last of a row is perhaps
    smaller. Shape: (O, I), in `weight`'s dtype.
    """
    rows, columns = weight.shape
    padded = nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    top = 2 ** (bits - 1) - 1
    step = padded.abs().amax(-1, keepdim=True) / top
    whole = torch.where(step > 0, padded / step, 0).round()
    rounded: Tensor = (whole * step).view(rows, -1)[:, :columns]
    return rounded.to(weight.dtype)


@contextmanager
def quantised(model: nn.Module, bits: int, group: int) -> Iterator[None]:
    """Quantise the adapted linears' stored weights, merged ones if the model is merged."""
    layers = state_of(model).layers.values()
    kept = [layer.base.weight.detach().clone() for layer in layers]
    try:
        for layer in layers:
            layer.base.weight.detach().copy_(quantise(layer.base.weight, bits, group))
        model.eval()  # layers forget what they derived from the weight
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.base.weight.detach().copy_(weight)
        model.eval()
