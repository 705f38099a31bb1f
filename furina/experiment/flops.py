"""How many FLOPs a run takes, in closed form; only matrix products count.

For T tokens in rows of L, a decoder whose layers hold W entries of matrices, with queries of width
q, and n answer tokens that are predicted out of V with a hidden width h:

    frozen layers     2TW forward, 2TW for the gradient of the input; none for the weights
    attention         4TLq forward (every key, hidden or not), 8TLq backward
    output embedding  2nhV forward, 2nhV backward
    adapters          `furina.adapters.flops`; a third of it is the forward's
    recomputation     one forward of the layers more, with gradient checkpointing

Too much is said where no gradient is sent: to the input of the first layer's q, k and v, which is
2Td(k + R) for a (d, k) linear with R rows of A, and in layers below the first adapted one. In
scoring an adapter takes two for each of its parameters and tokens.
"""

from __future__ import annotations

from furina.adapters.flops import adapter_flops
from furina.experiment.shapes import Adapted, Decoder


def step_flops(
    decoder: Decoder,
    adapted: Adapted,
    tokens: int,
    length: float,
    answers: float,
    checkpointing: bool = False,
) -> int:
    """Return the FLOPs of an optimiser step over `tokens` tokens in rows of `length`.

    `answers` of the tokens are predicted.
    """
    layers = 4 * tokens * decoder.layers * decoder.layer_weights
    attention = 12 * tokens * decoder.layers * decoder.queries * length
    head = 4 * answers * decoder.hidden * decoder.vocabulary
    adapters = sum(
        adapter_flops(adapted.config, tokens, d, k, name) for name, d, k in adapted.linears
    )
    again = layers / 2 + attention / 3 + adapters / 3 if checkpointing else 0
    return round(layers + attention + head + adapters + again)


def forward_flops(
    decoder: Decoder, adapted: Adapted | None, tokens: float, length: float, answers: float
) -> int:
    """Return the FLOPs of reading `tokens` tokens in rows of `length`, `answers` of them scored."""
    weights = decoder.layers * decoder.layer_weights + (adapted.trainable if adapted else 0)
    attention = 4 * tokens * decoder.layers * decoder.queries * length
    head = 2 * answers * decoder.hidden * decoder.vocabulary
    return round(2 * tokens * weights + attention + head)
