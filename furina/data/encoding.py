"""The one place that turns text into tokens, for training, scoring and generation alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from furina.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "Question: 1"


class Encoded(NamedTuple):
    """A context and its continuation; `is_split` if they join to the tokens of the joined text.

    They do not where the tokenizer merges the end of the one with the start of the other.
    """

    context: list[int]
    continuation: list[int]
    is_split: bool


class Encoder:
    """Encodes texts as one tokenizer does, knowing which tokens that adds by itself.

    Attributes:
        prefix: the tokens that it puts before a text: none, or a BOS.

    Raises:
        ConfigurationError: it puts a token behind a text, or two BOS tokens before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read what the tokenizer adds."""
        self.tokenizer = tokenizer
        self.prefix = _prefix(tokenizer)
        first = tokenizer.bos_token_id
        if first is None:
            first = tokenizer.eos_token_id
        self._own = None if first is None else str(tokenizer.decode(first))

    def encode(self, text: str) -> list[int]:
        """Return a text's tokens, behind `prefix` unless the text brings its own BOS."""
        adds = self._own is None or not text.startswith(self._own)
        return list(self.tokenizer.encode(text, add_special_tokens=adds, verbose=False))

    def pair(self, context: str, continuation: str) -> Encoded:
        """Encode both texts as lm-eval's HFLM does: whole first, then cut where the context ends.

        Spaces at the end of the context move to the continuation, and a BOS is there exactly if
        the tokenizer adds one by itself (lm-eval 0.4.13, `TemplateLM._encode_pair`).

        Raises:
            ConfigurationError: the context is empty.
        """
        if not context:
            raise ConfigurationError("A prompt's context is empty: there is nothing to continue.")
        whole = self.encode(context + continuation)
        ids = self.encode(context.rstrip())
        end = len(ids)
        return Encoded(ids, whole[end:], is_split=whole[:end] == ids)

    def trained(self, context: str, continuation: str) -> Encoded:
        """Encode for training: the context as a prompt has it, then all of the answer.

        Where the border is merged, the answer is encoded by itself.
        """
        pair = self.pair(context, continuation)
        if pair.is_split:
            return pair
        rest = context[len(context.rstrip()) :] + continuation
        alone = self.tokenizer.encode(rest, add_special_tokens=False, verbose=False)
        return pair._replace(continuation=list(alone))

    def scored(self, context: str, continuation: str) -> Encoded:
        """Encode for scoring, which takes an answer whose tokens are all its own.

        Raises:
            ConfigurationError: a token holds text of both sides, or the answer has no token.
        """
        pair = self.pair(context, continuation)
        if not (pair.is_split and pair.continuation):
            raise ConfigurationError(
                f"The tokenizer does not part the answer {continuation[:40]!r} from its prompt "
                f"{'…' + context[-40:]!r}: what the answer alone is worth cannot be said, so use a "
                "generate protocol or another model."
            )
        return pair

    def cut(self, ids: Sequence[int], longest: int | None, keep: int = 1) -> list[int]:
        """Return at most `longest` tokens: drop the start, keep a BOS and the last `keep`.

        The BOS is dropped too where there is no room for both.
        """
        if longest is None or len(ids) <= longest:
            return list(ids)
        head = len(self.prefix) if tuple(ids[: len(self.prefix)]) == self.prefix else 0
        if not head and ids[0] == self.tokenizer.bos_token_id:
            head = 1
        head = head if longest - head >= keep else 0
        return [*ids[:head], *ids[len(ids) - (longest - head) :]]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Return the tokens of both texts, as `Encoder.pair` parts them.

    Raises:
        ConfigurationError: the context is empty, or the tokenizer adds what it should not.
    """
    return Encoder(tokenizer).pair(context, continuation)[:2]


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, sequences: Iterable[Sequence[int]], embeddings: int
) -> None:
    """Raise ConfigurationError if a token has no row among the model's embeddings."""
    highest = max((max(ids) for ids in sequences if ids), default=0)
    if highest >= embeddings:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ConfigurationError(
            f"The tokenizer's token {token!r} is number {highest}, and the model has {embeddings} "
            "embeddings: use the model's own tokenizer, or call model.resize_token_embeddings and "
            "train them."
        )


def _prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    bare = list(tokenizer.encode(_PROBE, add_special_tokens=False))
    whole = list(tokenizer.encode(_PROBE))
    starts = [at for at in range(len(whole)) if whole[at : at + len(bare)] == bare]
    if not bare or not starts:
        raise ConfigurationError(
            f"The tokenizer turns the text {_PROBE!r} into {len(bare)} tokens and, with its "
            "special tokens, into others: use the model's own tokenizer."
        )
    before, behind = whole[: starts[0]], whole[starts[0] + len(bare) :]
    if behind:
        raise ConfigurationError(
            f"The tokenizer appends EOS to a prompt ({_named(tokenizer, behind)}), and nothing "
            "goes on behind an end: load it with add_eos_token=False, or take the token out of "
            "its post-processor."
        )
    if len(set(before)) < len(before):
        raise ConfigurationError(
            f"The tokenizer puts two BOS tokens before a prompt ({_named(tokenizer, before)}): "
            "load it without one of them."
        )
    return tuple(before)


def _named(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return " ".join(map(str, tokenizer.convert_ids_to_tokens(ids)))
