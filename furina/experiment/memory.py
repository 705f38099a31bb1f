"""What a run needs of a device's memory, in closed form, in bytes.

Training keeps the frozen weights in their dtype, and each trained parameter in fp32 with its
gradient and AdamW's two moments. To these come the activations (see furina.experiment.activations),
and what works for a moment: gradients of one FFN, 2T(f + h)·e, and the logits of the answer tokens,
in the dtype and three times in fp32. The first step of every method peaked at 79 to 104 % of that.

Scoring keeps no activations. It works on as many tokens at once as the engine packs, or writes
`eval_batch_size` answers at once with their keys and values kept.

Not counted is what an allocator leaves unused (often some percent) and what the driver itself takes
(some hundred MB).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from furina.adapters.kept import FULL, derived_bytes, ffn_passes
from furina.evaluation.engine import budget_of
from furina.experiment.activations import MicroBatch, activation_bytes
from furina.experiment.shapes import Adapted, Decoder

TRAINED = 4 * FULL
"""Bytes of a trained parameter: itself, its gradient and two moments."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, or of scoring where nothing is trained.

    Attributes:
        weights: the frozen backbone.
        adapter: its parameters, their gradients and moments, and what it holds beside them.
        activations: what is kept for the backward; in scoring, keys and values.
        working: what one operation needs for a moment, logits included.
    """

    weights: int
    adapter: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.adapter + self.activations + self.working


def training_memory(
    decoder: Decoder, adapted: Adapted, batch: MicroBatch, shards: int = 1
) -> Memory:
    """Return the peak of a training step whose micro-batches are all like `batch`.

    Weights, parameters, gradients and moments may be cut into `shards`, one for each device.
    """
    logits = batch.rows * batch.answers * decoder.vocabulary * (batch.item_size + 3 * FULL)
    widths = decoder.ffn * ffn_passes(adapted.config) + decoder.hidden
    derived = sum(
        derived_bytes(adapted.config, batch.item_size, k, batch.accumulates)
        for _, _, k in adapted.linears
    )
    return Memory(
        weights=decoder.parameters * batch.item_size // shards,
        adapter=(TRAINED * adapted.trainable + FULL * adapted.kept) // shards + derived,
        activations=activation_bytes(decoder, adapted, batch),
        working=round(logits) + 2 * batch.tokens * widths * batch.item_size,
    )


def scoring_memory(
    decoder: Decoder,
    adapted: Adapted | None,
    item_size: int,
    written: int = 0,
    kind: str = "cuda",
) -> Memory:
    """Return the peak of scoring on a device of that kind.

    `written` tokens have their keys and values kept.
    """
    budget = budget_of(torch.device(kind))
    ffn = 3 * budget.tokens * decoder.ffn * item_size
    logits = budget.logits * item_size + budget.softmax * 2 * FULL
    return Memory(
        weights=decoder.parameters * item_size,
        adapter=FULL * (adapted.trainable + adapted.kept) if adapted else 0,
        activations=decoder.cached * item_size * written,
        working=ffn + logits,
    )
