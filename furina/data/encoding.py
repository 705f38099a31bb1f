"""The one place that turns text into tokens, for training and for evaluation alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    prefix = tokenizer.bos_token_id
    if prefix is None:
        prefix = tokenizer.eos_token_id
    if text.startswith(str(tokenizer.decode(prefix))):  # the text brings its own BOS
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokenise both texts as lm-eval's HFLM does: whole first, then cut where the context ends.

    Spaces at the end of the context move to the continuation, and a BOS is there exactly if the
    tokenizer adds one by itself (lm-eval 0.4.13, `TemplateLM._encode_pair`, `HFLM.tok_encode`).

    Raises:
        ConfigurationError: the context is empty.
    """
    stripped = context.rstrip()
    if not context:
        raise ConfigurationError("A prompt's context is empty: there is nothing to continue.")
    whole = _encode(tokenizer, context + continuation)
    context_ids = _encode(tokenizer, stripped)
    return context_ids, whole[len(context_ids) :]
