"""Which experts the tokens of a model choose: sums over real tokens, linear by linear.

Nothing here grows with the number of tokens: at most CHUNK of them are looked at together.

Shape legend: T tokens, I = d in_features, N experts, U output units that weigh the experts apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from furina.adapters.mixture import MixtureLinear
from furina.errors import ConfigurationError
from furina.kernels.forward import Forward
from furina.model.merging import is_merged
from furina.model.state import state_of

CHUNK = 256
"""Tokens whose activity is held at once: per output unit it is large."""


class SelectionSums(NamedTuple):
    """Sums over tokens in float64; a token's U units weigh 1/U each. See `records.activity`."""

    top_k_share: Tensor
    """Σ_t Σ_{K largest} p_ti, a scalar."""
    entropy: Tensor
    """Σ_t H(p_t) / log N, a scalar."""
    selected: Tensor
    """Σ_t 1[i is among the K largest]. Shape: (N,)."""
    share: Tensor
    """Σ_t p_ti. Shape: (N,)."""
    first: Tensor
    """Σ_t 1[i has the largest share]. Shape: (N,)."""
    norms: Tensor
    """Σ_t of |Σ_shared Δy_t| and |Σ_routed Δy_t|. Shape: (2,), or (0,) where it has not both."""


@dataclass
class Selection:
    """What the tokens of the forwards that were watched chose, by linear."""

    tokens: int = 0
    """Real tokens, each counted once."""
    sums: dict[str, SelectionSums] = field(default_factory=dict)

    def top_k_share(self) -> dict[str, float]:
        """Return each linear's mean share of the K most active experts, in [K/N, 1]."""
        return {name: sums.top_k_share.item() / self.tokens for name, sums in self.sums.items()}

    def mean_top_k_share(self) -> float:
        """Return the top-K share averaged over the linears."""
        shares = self.top_k_share().values()
        return sum(shares) / len(shares)

    def activity_share(self) -> dict[str, Tensor]:
        """Return each linear's P_i, the experts' mean shares of activity. Shape: (N,)."""
        return {name: sums.share / self.tokens for name, sums in self.sums.items()}


@contextmanager
def record_selection(model: nn.Module) -> Iterator[Selection]:
    """Sum up expert selection over the forwards run inside, in any mode, without gradients.

    Dropout is left out. Raises ConfigurationError if the method has no experts to select from, or
    if the adapter is merged.
    """
    config = state_of(model).config
    if not config.records_selection:
        raise ConfigurationError(
            f"This {config.name} adapter has no experts to select from, so there is no selection "
            "to record."
        )
    with watching(model) as found:
        yield found


@contextmanager
def watching(model: nn.Module) -> Iterator[Selection]:
    """Sum up the activity of the experts in all linears of `choosing`, without gradients.

    Raises ConfigurationError as `choosing`.
    """
    layers, found = choosing(model), Selection()
    first = next(iter(layers))

    def add(layer: MixtureLinear, x: Tensor) -> None:
        found.tokens += len(x) * (layer.name == first)
        for tokens in torch.split(x, CHUNK):
            sums, known = selection_sums(layer, tokens), found.sums.get(layer.name)
            found.sums[layer.name] = SelectionSums(*map(torch.add, known, sums)) if known else sums

    with listening(model, layers.values(), add):
        yield found


def choosing(model: nn.Module) -> dict[str, MixtureLinear]:
    """Return the linears whose tokens choose among experts, by name.

    Raises ConfigurationError, with the reason, if there is none, or if the adapter is merged.
    """
    state = state_of(model)
    mixtures = {n: layer for n, layer in state.layers.items() if isinstance(layer, MixtureLinear)}
    found = {name: layer for name, layer in mixtures.items() if layer.refusal is None}
    if not found:
        reasons = [layer.refusal for layer in mixtures.values()]
        reason = reasons[0] if reasons else "it is no mixture of experts"
        raise ConfigurationError(
            f"This {state.config.name} adapter has no experts to select from: {reason}."
        )
    if is_merged(model):
        raise ConfigurationError("The adapter is merged: call furina.unmerge first.")
    return found


@contextmanager
def listening(
    model: nn.Module,
    layers: Collection[MixtureLinear],
    hear: Callable[[MixtureLinear, Tensor], None],
) -> Iterator[None]:
    """Hand over the inputs (T, I) that real tokens bring to `layers` in the forwards inside.

    Layers that gradient checkpointing runs again in a backward pass are not heard again.
    """
    forward: Forward | None = None

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal forward
        forward = Forward.of(module, args, kwargs)

    def end(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        nonlocal forward
        forward = None

    @torch.no_grad()
    def listen(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MixtureLinear)
        if forward is None:
            return
        x, real = args[0], forward.real_tokens(args[0], layer.name)
        flat = x.reshape(-1, x.shape[-1])
        hear(layer, flat if real is None else flat[real.squeeze(1)])

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
        *(layer.register_forward_pre_hook(listen) for layer in layers),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def selection_sums(layer: MixtureLinear, x: Tensor) -> SelectionSums:
    """Return the sums of one linear over its inputs x (T, I)."""
    parts = layer.parts(x) or ()
    norms = [torch.linalg.vector_norm(part, dim=-1).sum(dtype=torch.float64) for part in parts]
    together = torch.stack(norms) if norms else x.new_empty(0, dtype=torch.float64)
    return share_sums(layer.activity(x), layer.most_active)._replace(norms=together)


def share_sums(p: Tensor, top_k: int) -> SelectionSums:
    """Return what shares p (T, U, N) decide, without norms."""
    units, n = p.shape[1:]
    top = p.topk(min(top_k, n), dim=-1)

    def total(values: Tensor) -> Tensor:
        return values.mean(1).sum(0, dtype=torch.float64)

    def count(indices: Tensor) -> Tensor:
        return torch.bincount(indices.flatten(), minlength=n).to(torch.float64) / units

    return SelectionSums(
        top_k_share=total(top.values.sum(-1)),
        entropy=total(torch.special.entr(p).sum(-1)) / math.log(n),
        selected=count(top.indices),
        share=total(p),
        first=count(top.indices[..., 0]),
        norms=p.new_empty(0, dtype=torch.float64),
    )
