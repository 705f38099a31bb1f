"""What autograd keeps of one micro-batch of training, in closed form, in bytes.

For B rows of L tokens, T = B·L, numbers of e bytes, and a layer with hidden width h, queries q,
keys u and FFN width f:

    norms             2T(h + 1)·4: their input in fp32 and its scale
    inputs            T·d·e of every tensor that an adapted linear reads; q, k and v read one, and
                      gate and up
    attention, sdpa   4Tq·e for q, repeated k and v, and the output; 4 bytes for each head and
                      token; a mask of B·L²·e
    attention, eager  3Tq·e, and the scores: B·L² for each head in fp32, and in the dtype if another
    FFN               3Tf·e: before and behind the activation, and up
    an adapter        `furina.adapters.kept`

The final norm is counted for the first layer's, whose input needs no gradient. With gradient
checkpointing only the layers' inputs are kept, T·h·e each, and one layer is there at a time; what
linears record for an auxiliary loss stays until the backward of that loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from furina.adapters.kept import FULL, adapter_bytes, keeps_input, recorded_bytes
from furina.experiment.shapes import Adapted, Decoder

_SHARED_INPUT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention"),
    **dict.fromkeys(("gate_proj", "up_proj"), "ffn"),
}
"""Linears of a block that read one tensor."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward of training reads: rows of padded `length`, `answers` tokens of each asked.

    `item_size` is the bytes of a number of the backbone; `attention` is sdpa, eager or another,
    which is taken for sdpa; `accumulates` is whether an optimiser step has several.
    """

    rows: int
    length: int
    answers: float
    item_size: int
    attention: str = "sdpa"
    checkpointing: bool = False
    accumulates: bool = False

    @property
    def tokens(self) -> int:
        """Positions, padding included."""
        return self.rows * self.length


def activation_bytes(decoder: Decoder, adapted: Adapted, batch: MicroBatch) -> int:
    """Return what is kept of a micro-batch's layers for the backward."""
    inputs, adapters = _input_bytes(adapted, batch), _adapters_bytes(adapted, batch)
    layers = decoder.layers * layer_bytes(decoder, batch) + inputs + adapters
    rotation = 2 * batch.length * decoder.queries // decoder.heads * batch.item_size
    if not batch.checkpointing:
        return layers + rotation
    kept = decoder.layers * batch.tokens * decoder.hidden * batch.item_size
    recorded = recorded_bytes(adapted.config, batch.tokens, batch.item_size)
    # What linears recorded goes before the backward computes the first layer again.
    return kept + max(len(adapted.linears) * recorded, layers // decoder.layers) + rotation


def layer_bytes(decoder: Decoder, batch: MicroBatch) -> int:
    """Return what a layer keeps by itself, whatever is adapted in it."""
    tokens, size = batch.tokens, batch.item_size
    norms = 2 * tokens * (decoder.hidden + 1) * FULL
    pairs = batch.rows * batch.length**2
    if batch.attention == "eager":
        scores = pairs * decoder.heads * (FULL + (size if size != FULL else 0))
        attention = 3 * tokens * decoder.queries * size + scores
    else:
        attention = 4 * tokens * decoder.queries * size + tokens * decoder.heads * FULL
        attention += pairs * size
    return norms + attention + 3 * tokens * decoder.ffn * size


def _input_bytes(adapted: Adapted, batch: MicroBatch) -> int:
    """Return the distinct tensors that adapted linears read; sdpa has kept its output already."""
    if not keeps_input(adapted.config):
        return 0
    read: dict[tuple[str, str], int] = {}
    for name, in_features, _ in adapted.linears:
        block, _, leaf = name.rpartition(".")
        if leaf != "o_proj" or batch.attention == "eager":
            read[block, _SHARED_INPUT.get(leaf, leaf)] = in_features
    return sum(read.values()) * batch.tokens * batch.item_size


def _adapters_bytes(adapted: Adapted, batch: MicroBatch) -> int:
    each = (adapted.config, batch.tokens, batch.item_size)
    return sum(adapter_bytes(*each, d, k, name) for name, d, k in adapted.linears)
