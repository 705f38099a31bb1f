"""Experts' activity on the real tokens of a model's batches, kept as sums linear by linear.

Nothing here grows with the number of tokens: at most CHUNK of them are looked at together.

Shape legend: T tokens, I = d in_features, N experts, U output units that weigh the experts apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from furina.adapters.mixture import MixtureLinear
from furina.data.batches import Batch
from furina.errors import ConfigurationError
from furina.kernels.forward import Forward
from furina.model.inference import evaluation_mode, logits_at
from furina.model.merging import is_merged
from furina.model.state import state_of

CHUNK = 256
"""Tokens whose activity is held at once: per output unit it is large."""


class ActivitySums(NamedTuple):
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

    def plus(self, other: ActivitySums) -> ActivitySums:
        """Return the sums over both's tokens."""
        return ActivitySums(*(a + b for a, b in zip(self, other, strict=True)))


def choosing(model: nn.Module) -> dict[str, MixtureLinear]:
    """Return the linears whose tokens choose among experts, by name.

    Raises ConfigurationError, with the reason, if there is none, or if the model is merged.
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


@torch.inference_mode()
def collect(model: nn.Module, batches: Iterable[Batch]) -> dict[str, ActivitySums]:
    """Return the sums over all real tokens of `batches` for each linear of `choosing`.

    The model runs in eval mode and keeps its own. Raises ConfigurationError as `choosing`, and if
    a linear took no part.
    """
    layers = choosing(model)
    found: dict[str, ActivitySums] = {}

    def add(layer: MixtureLinear, x: Tensor) -> None:
        for tokens in torch.split(x, CHUNK):
            sums = _sums(layer, tokens)
            known = found.get(layer.name)
            found[layer.name] = sums if known is None else known.plus(sums)

    with evaluation_mode(model):
        for batch in batches:
            _hear(model, batch, layers.values(), add)
    for name in layers:
        if name not in found:
            raise ConfigurationError(
                f"{name} took no part in the forward, so its experts' activity is unknown: leave "
                "it out of the targets."
            )
    return {name: found[name] for name in layers}


@torch.inference_mode()
def strongest(
    model: nn.Module, batch: Batch, layers: Collection[MixtureLinear]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each real token's most active expert, and its share, in some linears, by name.

    The shares of output units that weigh apart are averaged. Shape: (T,) each.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(layer: MixtureLinear, x: Tensor) -> None:
        best = [layer.activity(tokens).mean(1).max(-1) for tokens in torch.split(x, CHUNK)]
        expert, share = (torch.cat([one[i] for one in best]) for i in (1, 0))
        found[layer.name] = expert, share

    with evaluation_mode(model):
        _hear(model, batch, layers, keep)
    return found


def share_sums(p: Tensor, top_k: int) -> dict[str, Tensor]:
    """Return the fields of `ActivitySums` that shares p (T, U, N) decide."""
    units, n = p.shape[1:]
    top = p.topk(min(top_k, n), dim=-1)

    def total(values: Tensor) -> Tensor:
        return values.mean(1).sum(0, dtype=torch.float64)

    def count(indices: Tensor) -> Tensor:
        return torch.bincount(indices.flatten(), minlength=n).to(torch.float64) / units

    return {
        "top_k_share": total(top.values.sum(-1)),
        "entropy": total(torch.special.entr(p).sum(-1)) / math.log(n),
        "selected": count(top.indices),
        "share": total(p),
        "first": count(top.indices[..., 0]),
    }


def _sums(layer: MixtureLinear, x: Tensor) -> ActivitySums:
    """Return the sums of one linear over its inputs x (T, I)."""
    parts = layer.parts(x) or ()
    norms = [torch.linalg.vector_norm(part, dim=-1).sum(dtype=torch.float64) for part in parts]
    together = torch.stack(norms) if norms else x.new_empty(0, dtype=torch.float64)
    return ActivitySums(**share_sums(layer.activity(x), layer.most_active), norms=together)


def _hear(
    model: nn.Module,
    batch: Batch,
    layers: Collection[MixtureLinear],
    hear: Callable[[MixtureLinear, Tensor], None],
) -> None:
    """Run one batch and hand over the inputs (T, I) that real tokens bring to `layers`."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    forward = Forward(mask != 0, ids.numel())

    def listen(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, MixtureLinear)
        x = inputs[0]
        real = forward.real_tokens(x, layer.name)
        assert real is not None
        hear(layer, x.reshape(-1, x.shape[-1])[real.squeeze(1)])

    handles = [layer.register_forward_pre_hook(listen) for layer in layers]
    try:
        logits_at(model, ids.new_zeros(1), ids, attention_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
