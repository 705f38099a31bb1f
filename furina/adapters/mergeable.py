"""A linear that can hold its update in its own weight, and give it back bit for bit."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.kernels.sharding import is_sharded


class MergeableLinear(nn.Module, ABC):
    """A frozen linear `base` with an update ΔW that may be merged into it."""

    def __init__(self, base: nn.Linear, name: str) -> None:
        """Keep `base`, called `name` in the model, as it is."""
        super().__init__()
        self.base = base
        self.name = name
        self._pristine: Tensor | None = None
        self._merged = False

    @abstractmethod
    def delta(self) -> Tensor:
        """Return ΔW in float64. Shape: (O, I). Raises NotMergeableError where there is none."""

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update now."""
        return self._merged

    @property
    def has_pristine_weight(self) -> bool:
        """Whether the backbone's own W is at hand: not after a merge that kept no copy."""
        return not self._merged or self._pristine is not None

    @property
    def pristine_weight(self) -> Tensor:
        """The backbone's own W, whether merged or not. Shape: (O, I)."""
        if not self.has_pristine_weight:
            raise ConfigurationError(
                f"{self.name} was merged with keep_base=False, so W is gone: reload the backbone."
            )
        if is_sharded(self.base.weight):
            raise ConfigurationError(
                f"{self.name} is sharded over several devices: gather the adapter on all of them "
                "with furina.adapter_state_dict, and load it into a model on one."
            )
        return self.base.weight.detach() if self._pristine is None else self._pristine

    @torch.no_grad()
    def merged_weight(self, delta: Tensor | None = None) -> Tensor:
        """Return W + ΔW, summed in float64 and rounded once to the base's dtype. Shape: (O, I).

        `delta` is `delta()`, if the caller has it already: it is the expensive part.
        """
        weight = self.pristine_weight.to(self.base.weight.device)
        delta = self.delta() if delta is None else delta
        return (weight.to(torch.float64) + delta).to(self.base.weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the merged weight into the base; a copy of W on the CPU makes it undoable."""
        if self._merged:
            raise ConfigurationError(f"{self.name} is merged already.")
        merged = self.merged_weight()
        self._pristine = self.base.weight.detach().to("cpu", copy=True)
        self._merged = True  # before the first byte is written: `unmerge` undoes a part as well
        self.base.weight.copy_(merged)

    def give_up_base(self) -> None:
        """Forget W for good: the merged base is what is left."""
        self._pristine = None

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W bit for bit; raises ConfigurationError if no copy was kept.

        The layer then follows the base; see `follow_base`.
        """
        if not self._merged:
            raise ConfigurationError(f"{self.name} is not merged.")
        self.base.weight.copy_(self.pristine_weight)
        self._pristine = None
        self._merged = False
        self.follow_base()

    def follow_base(self) -> None:
        """Take over the mode, device and dtype that the model gave the base in the meantime."""
        self.train(self.base.training).to(self.base.weight.device)  # `_apply` sees to the dtype
