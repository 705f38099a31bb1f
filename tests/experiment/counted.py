"""What a step of a model really multiplies, keeps and holds, counted operation by operation."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import furina
from furina.training.loss import AnswerBatch, answer_loss

Step = Callable[[], Any]


def _product(added: Sequence[int], left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * math.prod(left) * right[-1]


IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}
"""Torch counts addmm and baddbmm, but not these."""


def flops(step: Step) -> int:
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        step()
    return int(counter.get_total_flops())


def batch_of(
    model: nn.Module, rows: int, length: int, answer: int, padded: bool = False
) -> AnswerBatch:
    """Return rows of which the last tokens are the answer, the first with padding if `padded`.

    The mask is there in any case: without one, transformers looks at values of the positions.
    """
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    ids = torch.zeros(rows, length, dtype=torch.long, device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if padded:
        inputs["attention_mask"][0, -1] = 0
    ends = torch.arange(length - answer - 1, length - 1, device=device)
    starts = length * torch.arange(rows, device=device)[:, None]
    targets = torch.zeros(rows * answer, dtype=torch.long, device=device)
    return AnswerBatch(inputs, (starts + ends).flatten(), targets, rows * length)


def loss_of(model: nn.Module, batch: AnswerBatch) -> Tensor:
    """Return the loss of a training step."""
    return answer_loss(model, batch)[0] + furina.auxiliary_loss(model)


def _own(model: nn.Module) -> set[int]:
    tensors = (*model.parameters(), *model.buffers())
    return {tensor.untyped_storage()._cdata for tensor in tensors}


@contextmanager
def kept(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Yield a function that sums the storages kept inside for the backward; not the model's own."""
    held: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage  # held, so that no address is used again
        return tensor

    own = _own(model)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(s.nbytes() for address, s in held.items() if address not in own)


class Live(TorchDispatchMode):
    """Follow the bytes of all storages that operations make beside the model's, and their peak."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known = _own(model)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
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
