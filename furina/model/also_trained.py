"""Weights of the model that are trained beside an adapter, such as an unfrozen head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.kernels.sharding import write
from furina.model.fingerprint import backbone_weights
from furina.model.state import AdaptedState, state_of


class Borrowed(NamedTuple):
    """A weight that came with the adapter, and the backbone's own, which `remove` puts back."""

    name: str
    weight: Tensor
    own: Tensor
    state: AdaptedState

    @torch.no_grad()
    def remove(self) -> None:
        """Put the backbone's own values back, unless a merge has given up the backbone."""
        if all(layer.has_pristine_weight for layer in self.state.layers.values()):
            write(self.weight, self.own)


def also_trained(model: nn.Module) -> dict[str, Tensor]:
    """Return what belongs to an adapted model's adapter without being part of it, by plain name.

    That is every other parameter that is trainable now, and what was loaded with the adapter.

    Raises ConfigurationError if the weight of an adapted linear is among them.
    """
    state = state_of(model)
    borrowed = {handle.name for handle in state.handles if isinstance(handle, Borrowed)}
    weights = backbone_weights(model)
    others = {n: weight for n, weight in weights.items() if weight.requires_grad or n in borrowed}
    for name in state.layers:
        if f"{name}.weight" in others:
            raise ConfigurationError(
                f"{name} has an adapter and a trainable weight: freeze the weight, or leave the "
                "linear out of the targets."
            )
    return others


@torch.no_grad()
def borrow(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights that fit into an adapted model, trainable; `remove` takes them out again."""
    own, state = backbone_weights(model), state_of(model)
    for name, value in weights.items():
        weight = own[name]
        before = weight.detach().to("meta" if weight.is_meta else "cpu", copy=True)
        state.handles.append(Borrowed(name, weight, before, state))
        write(weight, value)
        weight.requires_grad_(True)
