"""Generate answers deterministically, and independently of what else is in the batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from furina.data.encoding import Encoder, check_vocabulary
from furina.data.protocols import Decoding
from furina.errors import ConfigurationError, FurinaError
from furina.evaluation.independence import (
    check_causal,
    forget_lengths,
    original_length,
    reads_padding,
    vocabulary,
)
from furina.model.inference import contiguous_lm_head_input, evaluation_mode
from furina.progress import advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Generated:
    """What a model wrote after each prompt.

    Attributes:
        texts: the new text of each prompt, in the prompts' order, without its stop.
        prompt_ids: the token ids of the first prompt as the model read them, padding left off.
        truncated: number of prompts whose beginning was cut to leave room for an answer.
    """

    texts: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    truncated: int


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    decoding: Decoding,
    batch_size: int,
) -> Generated:
    """Continue every prompt by greedy or beam search, never by sampling.

    Prompts are padded on the left. With `decoding.pass_mask` padding is masked, and prompts are
    batched by length. Without, every position is attended to, padding included, and the batches
    are consecutive prompts as in LLM-Adapters: an answer then depends on its batch by design.

    A prompt is encoded as the tokenizer does by itself, with at most one BOS. One that leaves no
    room for `max_new_tokens` loses its beginning, not its BOS, and is counted and warned about.
    Where a model would let one prompt change another's answer, a batch is one prompt; that is
    warned about if padding is the reason. Writing ends at any end-of-text token of the tokenizer
    or of the model's generation config, of which nothing else is used. Model, tokenizer and config
    are left as they were.

    Raises:
        ConfigurationError: a bad batch size, an empty prompt, a tokenizer without padding token or
            with misplaced special tokens, a model that is not causal, or an answer longer than
            its positions.
        FurinaError: the model's outputs are not finite.
    """
    if batch_size < 1:
        raise ConfigurationError(f"The batch size must be at least 1, not {batch_size}.")
    with evaluation_mode(model):
        check_causal(model)
    pad_id = _pad_id(tokenizer, decoding)
    encoder, room = Encoder(tokenizer), _room(model, decoding)
    whole = [encoder.encode(prompt) for prompt in prompts]
    if not all(whole):
        raise ConfigurationError("A prompt is empty: there is nothing to continue.")
    encoded = [encoder.cut(ids, room) for ids in whole]
    check_vocabulary(tokenizer, [(pad_id,), *encoded], vocabulary(model))
    truncated = sum(len(ids) > len(cut) for ids, cut in zip(whole, encoded, strict=True))
    if truncated:
        warnings.warn(
            f"{truncated} of {len(prompts)} prompts leave no room for {decoding.max_new_tokens} "
            "new tokens: their beginnings were cut.",
            stacklevel=2,
        )
    order = list(range(len(prompts)))
    if decoding.pass_mask:  # the longest first: too large a batch fails at once
        order.sort(key=lambda index: -len(encoded[index]))
    texts = [""] * len(prompts)
    writer = _Writer(model, tokenizer, decoding, pad_id)
    with (
        evaluation_mode(model),
        _own_defaults(model),
        contiguous_lm_head_input(model),
        torch.inference_mode(),
    ):
        for indices in _batches(order, writer, [len(ids) for ids in encoded], batch_size):
            written = writer.write([encoded[index] for index in indices])
            for index, text in zip(indices, written, strict=True):
                texts[index] = text
    return Generated(tuple(texts), tuple(encoded[0]) if encoded else (), truncated)


def _pad_id(tokenizer: PreTrainedTokenizerBase, decoding: Decoding) -> int:
    for candidate in (decoding.pad_id, tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    raise ConfigurationError(
        "The tokenizer has neither a padding nor an end-of-text token: give it a pad_token."
    )


def _room(model: PreTrainedModel, decoding: Decoding) -> int | None:
    """Return the longest prompt in tokens, None where the model knows no limit."""
    config = model.config.get_text_config(decoder=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or positions < 0:
        return None
    room = int(positions) - decoding.max_new_tokens
    if room < 2:  # a BOS and one token more
        raise ConfigurationError(
            f"The model has {positions} positions: max_new_tokens={decoding.max_new_tokens} "
            "leaves none for a prompt."
        )
    return room


def _batches(
    order: Sequence[int], writer: _Writer, lengths: Sequence[int], batch_size: int
) -> Iterator[Sequence[int]]:
    """Yield the prompts of each batch: `batch_size`, or one where prompts would interact."""
    model, decoding, start = writer.model, writer.decoding, 0
    longest = original_length(model) if decoding.pass_mask else None
    is_padded = decoding.pass_mask and min(batch_size, len(set(lengths))) > 1
    if is_padded and reads_padding(model, writer.pad_id):
        batch_size = 1
        warnings.warn(
            f"{type(model).__name__} reads padding as text, so prompts are continued one at a "
            "time, which is slower.",
            stacklevel=3,
        )
    while start < len(order):
        advance(start, len(order), "answers")
        size = batch_size
        if longest is not None:
            forget_lengths(model)
            if lengths[order[start]] + decoding.max_new_tokens > longest:
                size = 1  # its frequencies would be those of the whole batch
        yield order[start : start + size]
        start += size


@contextmanager
def _own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Hide the model's generation config, from which transformers would fill every gap."""
    from transformers import GenerationConfig

    config = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = config


class _Writer:
    """One model's deterministic `generate`, batch by batch."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        pad_id: int,
    ) -> None:
        self.model, self.tokenizer, self.decoding, self.pad_id = model, tokenizer, decoding, pad_id
        self.ends = _ends(model, tokenizer)
        # A beam search does not go on from a sequence, and unmasked padding is part of a prompt.
        self.leaves_out = decoding.num_beams == 1 and decoding.pass_mask

    def write(self, prompts: Sequence[Sequence[int]]) -> list[str]:
        """Return the new text of each prompt of one batch.

        As soon as half of the rows have ended they are left out, and the others go on from what
        they have: one long answer does not keep a whole batch computing until it ends.
        """
        new: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        while rows:
            written = len(new[rows[0]])
            more = self._continue([[*prompts[row], *new[row]] for row in rows], written)
            for row, ids in zip(rows, more, strict=True):
                new[row] += ids
            rows = [row for row in rows if self.leaves_out and not self._ended(new[row])]
        return [self.text(ids) for ids in new]

    def _continue(self, sequences: Sequence[Sequence[int]], written: int) -> list[list[int]]:
        """Return what follows sequences that hold `written` new tokens each.

        That is all that is missing, or less where half of several rows ended.
        """
        from transformers import GenerationConfig

        width = max(map(len, sequences))
        device = self.model.device
        ids = torch.full((len(sequences), width), self.pad_id, device=device)
        # Without a mask transformers would infer one from the padding tokens it finds
        # (`_prepare_attention_mask_for_generation`): an unmasked batch takes a mask of ones.
        mask = torch.full_like(ids, 0 if self.decoding.pass_mask else 1)
        for row, sequence in enumerate(sequences):
            ids[row, width - len(sequence) :] = torch.tensor(sequence, device=device)
            mask[row, width - len(sequence) :] = 1
        config = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=self.decoding.max_new_tokens - written,
            num_beams=self.decoding.num_beams,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.ends) or None,
        )
        model: Any = self.model  # its `generate` is typed as a tensor
        output: Tensor = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=[_refuse_nan],
            stopping_criteria=[self._stops(width - written)],
        )
        rest: list[list[int]] = output[:, width:].tolist()
        return rest

    def _ended(self, ids: Sequence[int]) -> bool:
        """Return whether a row's new tokens are a whole answer."""
        whole = len(ids) >= self.decoding.max_new_tokens or not self.ends.isdisjoint(ids)
        return whole or self._stopped(ids)

    def _stopped(self, ids: Sequence[int]) -> bool:
        text = self._decode(ids) if self.decoding.stop else ""
        return any(stop in text for stop in self.decoding.stop)

    def text(self, ids: Sequence[int]) -> str:
        """Decode up to the end of text, then cut at the earliest stop."""
        # What follows the end is padding, and `pad_id` may be the id of an ordinary token.
        end = next((place for place, token in enumerate(ids) if token in self.ends), len(ids))
        text = self._decode(ids[:end])
        return text[: min([text.find(s) for s in self.decoding.stop if s in text] or [len(text)])]

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _stops(self, start: int) -> Any:
        """Return the criterion that ends a row, or all where half have ended.

        The text that will be cut is what is looked at, so none ends early without being cut;
        transformers' own `stop_strings` match tokens instead. New tokens begin at `start`.
        """

        def stops(ids: Tensor, scores: Any, **options: Any) -> Tensor:
            new = ids[:, start:].tolist()
            ended = [self._ended(row) if self.leaves_out else self._stopped(row) for row in new]
            if self.leaves_out and 2 * sum(ended) >= len(ended):
                ended = [True] * len(ended)
            return torch.tensor(ended, device=ids.device)

        return stops


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    own = getattr(model.generation_config, "eos_token_id", None)
    ids = own if isinstance(own, (list, tuple)) else [own]
    return frozenset(int(token) for token in [tokenizer.eos_token_id, *ids] if token is not None)


def _refuse_nan(ids: Tensor, scores: Tensor) -> Tensor:
    if torch.isnan(scores).any():
        raise FurinaError(
            "The model's outputs are not finite, so it cannot answer: check its weights and dtype."
        )
    return scores
