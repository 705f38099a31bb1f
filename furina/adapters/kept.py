"""What a method keeps of a training forward until the backward, in closed form, in bytes.

For T tokens and numbers of e bytes, a low-rank product of a (d, k) linear with total rank R keeps
A x, T·R·e; A and B in the dtype, R(d+k)·e, if that is not fp32; and with dropout a byte for each
element of its input. What methods keep beyond that stands at their functions. Neglected are single
numbers of an expert and a linear.
"""

from __future__ import annotations

from functools import singledispatch

from furina.adapters.base import AdapterConfig
from furina.adapters.dora import DoRAConfig
from furina.adapters.flylora import FlyLoRAConfig
from furina.adapters.furina import FurinaConfig
from furina.adapters.mixlora import DOWN, MixLoRAConfig
from furina.adapters.pissa import PiSSAConfig
from furina.adapters.routing import RoutedConfig

FULL = 4
"""Bytes of an fp32 number."""


@singledispatch
def adapter_bytes(
    config: AdapterConfig,
    tokens: int,
    item_size: int,
    in_features: int,
    out_features: int,
    name: str = "",
) -> int:
    """Return the bytes that the adapter of one linear keeps beside the linear's input.

    By default those of one low-rank product with as many trained parameters. A method that keeps
    more registers a function of its own, here or in its file.
    """
    trainable = config.count(in_features, out_features, name).trainable
    cast = trainable * item_size if item_size != FULL else 0
    dropped = tokens * in_features if config.dropout else 0
    ranks = trainable / (in_features + out_features)
    return round(tokens * ranks * item_size) + cast + dropped


_plain = adapter_bytes.dispatch(object)


@adapter_bytes.register
def _dora(config: DoRAConfig, tokens: int, size: int, d: int, k: int, name: str = "") -> int:
    # The dropped input, what W and the update make of it; without dropout only their sum.
    wide = d + 2 * k if config.dropout else k
    return _plain(config, tokens, size, d, k, name) + tokens * wide * size


@adapter_bytes.register
def _pissa(config: PiSSAConfig, tokens: int, size: int, d: int, k: int, name: str = "") -> int:
    product = _plain(config, tokens, size, d, k, name)
    if config.in_place:
        return product
    cast = config.rank * (d + k) * size if size != FULL else 0
    return product + cast + (tokens * d * size if config.dropout else 0)


@adapter_bytes.register
def _flylora(config: FlyLoRAConfig, tokens: int, size: int, d: int, k: int, name: str = "") -> int:
    # What is selected, and what of A x that leaves.
    cast = config.rank * (d + k) * size if size != FULL else 0
    dropped = tokens * d if config.dropout else 0
    return 2 * tokens * config.rank * size + cast + dropped


@adapter_bytes.register
def _routed(config: RoutedConfig, tokens: int, size: int, d: int, k: int, name: str = "") -> int:
    product = _plain(config, tokens, size, d, k, name)
    if not config.has_router(name):
        return product
    copy = d * FULL if size != FULL else 0  # a router reads fp32
    # Of each expert its probability, twice its weight, and an index where some are selected.
    experts = config.most_experts * (FULL + 2 * FULL + 8)
    return product + tokens * (copy + experts)


@adapter_bytes.register
def _mixlora(config: MixLoRAConfig, tokens: int, size: int, d: int, k: int, name: str = "") -> int:
    if config.num_experts_of(name) == 1 or config.router_removed:
        return _plain(config, tokens, size, d, k, name)
    copies = config.top_k
    down = name.rpartition(".")[2] == DOWN
    total = config.num_experts * config.rank
    reads = copies * d if down else d
    own = tokens * total * size * (copies + 1 if down else copies)
    cast = total * (d + k) * size if size != FULL else 0
    dropped = tokens * reads * (1 + size) if config.dropout else 0  # a mask, and what it leaves
    # Of down's input what the experts differ by, and all of it if none is dropped; of gate's output
    # both sides of the activation, of up's one.
    more = 1 + (not config.dropout) if down else 1 + config.has_router(name)
    wide = (copies - 1) * more * (d if down else k)
    routes = config.has_router(name)
    router = tokens * d * FULL if routes and size != FULL else 0
    choice = tokens * copies * config.num_experts * (size + 8 * routes)  # as numbers and indices
    return own + cast + dropped + tokens * wide * size + router + choice


@adapter_bytes.register
def _furina(config: FurinaConfig, tokens: int, size: int, d: int, k: int, name: str = "") -> int:
    total, routed = config.num_experts * config.rank, config.num_routed_experts
    product = tokens * total * size
    cast = total * (d + k) * size if size != FULL else 0
    dropped = tokens * d if config.dropout else 0
    if config.start == "subtract" and routed:
        cast *= 2
        dropped += tokens * d * size if config.dropout else 0
    selection = 0
    if config.has_auxiliary_loss:
        # Of each expert its activity; of a token their sum, and twice the choice of K.
        selection = tokens * (FULL * config.num_experts + FULL + 8 * config.top_k)
        if config.activity != "l2":
            selection += 2 * tokens * routed * k * FULL
    return product + cast + dropped + selection


def keeps_input(config: AdapterConfig) -> bool:
    """Return whether a linear keeps its input as it is, which linears may share.

    FlyLoRA's A is frozen and needs none; of DoRA with dropout each linear keeps its own.
    """
    frozen = isinstance(config, FlyLoRAConfig)
    return not (frozen or (isinstance(config, DoRAConfig) and config.dropout > 0))


def recorded_bytes(config: AdapterConfig, tokens: int, item_size: int) -> int:
    """Return what stays of a linear's forward for an auxiliary loss, recomputed or not."""
    if not (isinstance(config, FurinaConfig) and config.has_auxiliary_loss):
        return 0
    return tokens * config.num_experts * config.rank * item_size


def derived_bytes(
    config: AdapterConfig, item_size: int, out_features: int, accumulates: bool
) -> int:
    """Return what FURINA makes of a linear's parameters: B̃, its scales, A_i A_iᵀ and M_i.

    Where several micro-batches share them, B̃ of every linear is there at once, with its gradient;
    else only where it is not cast for the product.
    """
    if not isinstance(config, FurinaConfig):
        return 0
    n, r = config.num_experts, config.rank
    factors = (2 if accumulates else int(item_size == FULL)) * n * r
    grams = (1 + config.has_auxiliary_loss) * n * r**2
    return FULL * (out_features * (factors + 2 * n) + grams)


def ffn_passes(config: AdapterConfig) -> int:
    """Return how often a token passes an FFN."""
    return config.top_k if isinstance(config, MixLoRAConfig) and not config.router_removed else 1
