"""Check that a row's outputs do not depend on other rows, as batching and packing assume."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT, PADDING = 6, 12
"""Lengths of the probes in tokens: of the prompt, and of the padding before it."""

# Properties of the architecture: weights that change do not change them.
_causal: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
_reads_padding: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()


def rounding(model: PreTrainedModel, values: Tensor) -> float:
    """Return how far rounding alone may move two computations of `values` apart.

    Both round every sublayer's output, of which there are 2 per layer: with independent errors,
    they differ by about eps·√(2L) of their spread. Norms, softmax and logarithms round in fp32
    whatever the dtype.
    """
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", 1)
    eps = torch.finfo(model.dtype).eps * math.sqrt(2 * layers)
    return float(2 * eps * values.std() + 8 * torch.finfo(torch.float32).eps * values.abs().max())


def differ(model: PreTrainedModel, first: Tensor, second: Tensor) -> float | None:
    """Return the root mean square of the difference if rounding does not explain it, else None."""
    difference = (first - second).square().mean().sqrt().item()
    return difference if difference > rounding(model, second) else None


def check_causal(model: PreTrainedModel) -> None:
    """Raise ConfigurationError if a token changes the logits before it.

    The model should be in eval mode. Outputs that are not finite prove nothing and are let pass:
    whoever reads them reports them.
    """
    if model in _causal:
        return
    is_causal = not getattr(model.config, "is_encoder_decoder", False)
    if is_causal:
        ids = _drawn(model, 2, 2 * PROMPT)
        ids[1, :PROMPT] = ids[0, :PROMPT]
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[:, :PROMPT].double()
        if not logits.isfinite().all():
            return
        is_causal = differ(model, logits[1], logits[0]) is None
    if not is_causal:
        raise ConfigurationError(
            f"{type(model).__name__} is no causal language model: later tokens change what it says "
            "of earlier ones, so the likelihood of an answer cannot be read off; choose a decoder."
        )
    _causal.add(model)


def reads_padding(model: PreTrainedModel, pad_id: int) -> bool:
    """Return whether masked padding before a prompt changes what the model writes.

    In a recurrent model it may pass through the state. The model should be in eval mode.
    """
    if model not in _reads_padding:
        ids = _drawn(model, 2, PADDING + PROMPT)
        ids[1, :PADDING] = pad_id
        mask = torch.ones_like(ids)
        mask[1, :PADDING] = 0
        alone = _first_logits(model, ids[1:, PADDING:], mask[1:, PADDING:], pad_id)[0]
        beside = _first_logits(model, ids, mask, pad_id)[1]
        if not (alone.isfinite().all() and beside.isfinite().all()):
            return False
        _reads_padding[model] = differ(model, beside, alone) is not None
    return _reads_padding[model]


def _first_logits(model: Any, ids: Tensor, mask: Tensor, pad_id: int) -> Tensor:
    from transformers import GenerationConfig

    config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    logits: Tensor = output.logits[0].double()
    return logits


def original_length(model: PreTrainedModel) -> int | None:
    """Return the length beyond which a batch's longest row changes the others, None for none.

    Rope scaling "dynamic" and "longrope" choose one set of frequencies for a whole batch, by its
    last position (`dynamic_rope_update` of transformers).
    """
    lengths = []
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        for layer, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if isinstance(kind, str) and "dynamic" in kind:
                lengths.append(int(getattr(module, "original_max_seq_len", 1)))
            elif kind == "longrope":
                scaling = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
                own = scaling if layer is None else scaling[layer]
                lengths.append(int(own.get("original_max_position_embeddings", 1)))
    return min(lengths, default=None)


def forget_lengths(model: PreTrainedModel) -> None:
    """Reset "dynamic" rope scaling, which keeps the frequencies of the longest row so far."""
    with torch.inference_mode():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), use_cache=False)


def _drawn(model: PreTrainedModel, rows: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = vocabulary(model)
    return torch.randint(size, (rows, length), generator=generator).to(model.device)


def vocabulary(model: PreTrainedModel) -> int:
    """Return how many tokens the model can read."""
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)
