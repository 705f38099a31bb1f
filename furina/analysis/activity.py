"""Experts' activity on the real tokens of batches that an adapted model reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn

from furina.adapters.mixture import MixtureLinear
from furina.data.batches import Batch
from furina.errors import ConfigurationError
from furina.model.inference import evaluation_mode, logits_at
from furina.model.selection import CHUNK, SelectionSums, choosing, listening, watching


@torch.inference_mode()
def collect(model: nn.Module, batches: Iterable[Batch]) -> dict[str, SelectionSums]:
    """Return the sums over all real tokens of `batches` for each linear of `choosing`.

    The model runs in eval mode and keeps its own. Raises ConfigurationError as `choosing`, and if
    a linear took no part.
    """
    with evaluation_mode(model), watching(model) as found:
        for batch in batches:
            _read(model, batch)
    names = list(choosing(model))
    for name in names:
        if name not in found.sums:
            raise ConfigurationError(
                f"{name} took no part in the forward, so its experts' activity is unknown: leave "
                "it out of the targets."
            )
    return {name: found.sums[name] for name in names}


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

    with evaluation_mode(model), listening(model, layers, keep):
        _read(model, batch)
    return found


def _read(model: nn.Module, batch: Batch) -> None:
    """Run one batch, with the output head at a single position."""
    ids = batch["input_ids"]
    logits_at(model, ids.new_zeros(1), ids, attention_mask=batch["attention_mask"])
