"""Wrap a live model as lm-eval's HFLM, quietly, and leave the caller's objects unchanged."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import datasets
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import torch

from furina.data.encoding import Encoder, check_vocabulary
from furina.errors import ConfigurationError, nearest
from furina.evaluation.engine import Answer, Scorer
from furina.evaluation.evaluation import Engine
from furina.evaluation.independence import check_causal, original_length, reads_padding, vocabulary
from furina.model.inference import evaluation_mode
from furina.progress import advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOFTMAX_DTYPE = "float32"
"""Log-probabilities of a bf16 model would otherwise be rounded to 8 bits and tie."""

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]
"""A request of lm-eval: the texts (None for a part of a rolling text), context and continuation."""


class FittedLM(lm_eval.models.huggingface.HFLM):  # type: ignore[misc]
    """HFLM that keeps the BOS of a prompt it cuts, and refuses tokens unknown to the model."""

    batch_size_per_gpu: int

    def __init__(self, *args: Any, **options: Any) -> None:
        """Find out what the tokenizer adds."""
        super().__init__(*args, **options)
        self.encoder = Encoder(self.tokenizer)

    def cuts(self, context: Sequence[int], continuation: Sequence[int]) -> bool:
        """Return whether the model cannot read all of both; the last token is only predicted."""
        return bool(len(context) + len(continuation) > self.max_length + 1)

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], *args: Any, **options: Any
    ) -> Any:
        fitted, apart = self._fitted(requests), original_length(self.model)
        if apart is not None and any(len(c) + len(a) > apart + 1 for _, c, a in fitted):
            raise ConfigurationError(
                f"Engine lm_eval scores several prompts together, and beyond {apart} tokens "
                "the longest changes what this model says of the others: use engine 'shared'."
            )
        return super()._loglikelihood_tokens(fitted, *args, **options)

    def _fitted(self, requests: list[TokenRequest]) -> list[TokenRequest]:
        fitted = []
        for text, context, continuation in requests:
            room = self.max_length + 1
            if self.cuts(context, continuation) and room > len(continuation):
                whole = self.encoder.cut([*context, *continuation], room, len(continuation))
                context = whole[: -len(continuation)]
            fitted.append((text, context, continuation))
        ids = (side for _, *sides in fitted for side in sides)
        check_vocabulary(self.tokenizer, ids, vocabulary(self.model))
        return fitted

    def generate_until(self, *args: Any, **options: Any) -> list[str]:
        """Answer prompts, one at a time where those of a batch would affect each other."""
        own, pad = self.batch_size_per_gpu, self.tokenizer.pad_token_id
        is_apart = original_length(self.model) is not None
        if own != 1 and (is_apart or reads_padding(self.model, pad)):
            self.batch_size_per_gpu = 1
            warnings.warn(
                f"{type(self.model).__name__} would let prompts of a batch change each other's "
                "answers, so they are continued one at a time, which is slower.",
                stacklevel=2,
            )
        try:
            answers: list[str] = super().generate_until(*args, **options)
        finally:
            self.batch_size_per_gpu = own
        return answers


class SharedPrefixLM(FittedLM):
    """HFLM whose log-likelihoods come from a `Scorer`."""

    _scorer: Scorer | None = None

    def _loglikelihood_tokens(
        self,
        requests: list[TokenRequest],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Answer]:
        if self.backend != "causal":
            raise ConfigurationError("Shared prefixes need a causal language model.")
        if self._scorer is None:
            self._scorer = Scorer(self.model, self.max_length)
        own = None if self.batch_size == "auto" else self.batch_size
        self._scorer.batch_size = override_bs or own
        answers: dict[int, Answer] = {}
        fitted = [request[1:] for request in self._fitted(requests)]
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            for index, answer in self._scorer.stream(fitted):
                answers[index] = answer
                if (text := requests[index][0]) is not None:  # None: parts of a rolling text
                    self.cache_hook.add_partial("loglikelihood", text, answer)
        return [answers[index] for index in range(len(requests))]


@contextmanager
def live_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    engine: Engine = "shared",
) -> Iterator[FittedLM]:
    """Yield `model` as lm-eval's HFLM, in eval and inference mode.

    With engine "shared" its log-likelihoods are computed once for what requests share (see
    `engine`); with "lm_eval" they are HFLM's own. Modes and Python's random state, from which
    lm-eval draws task ids, come back afterwards.

    Raises ConfigurationError for an unknown engine, a batch size that is not positive, a
    model that is not causal, or a tokenizer that adds what no prompt can go on behind.
    """
    if engine not in get_args(Engine):
        raise ConfigurationError(
            f"There is no engine {engine!r}.{nearest(str(engine), get_args(Engine))}"
        )
    if batch_size < 1:
        raise ConfigurationError(f"The batch size must be at least 1, not {batch_size}.")
    with quiet(), evaluation_mode(model), torch.inference_mode():
        lm = (SharedPrefixLM if engine == "shared" else FittedLM)(
            pretrained=model,
            tokenizer=_with_special_tokens(tokenizer),
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=SOFTMAX_DTYPE,
        )
        assert lm.batch_size == batch_size and not lm.model.training
        check_causal(model)
        state = random.getstate()
        try:
            yield lm
        finally:
            random.setstate(state)


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a copy with the special tokens without which HFLM raises a TypeError."""
    own = copy.deepcopy(tokenizer)
    if own.eos_token_id is None:
        if own.pad_token_id is None and own.bos_token_id is None:
            raise ConfigurationError(
                "The tokenizer has neither a padding nor an end-of-text token: give it a pad_token."
            )
        own.eos_token = own.bos_token if own.pad_token_id is None else own.pad_token
    return own


@contextmanager
def quiet() -> Iterator[None]:
    """Silence all of lm-eval but its errors, and report its progress to `furina.progress`."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    chatty: tuple[Any, ...] = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
    bars = [module.tqdm for module in chatty]
    mapping = not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for module, bar in zip(chatty, bars, strict=True):
        module.tqdm = _bar(bar, "answers" if module is lm_eval.models.huggingface else None)
    try:
        yield
    finally:
        logger.setLevel(level)
        if mapping:
            datasets.enable_progress_bars()
        for module, bar in zip(chatty, bars, strict=True):
            module.tqdm = bar


def _bar(tqdm: type[Any], unit: str | None) -> type[Any]:
    """Return a silent kind of tqdm, which reports what it counts if that has a unit."""

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if unit and self.total:
                advance(self.n, self.total, unit)

    return Silent
