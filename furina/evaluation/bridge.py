"""The way into lm-eval: a live model as its HFLM, quietly, and nothing of the caller's changed."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import torch

from furina.errors import ConfigurationError, nearest
from furina.evaluation.engine import fitted_lm, shared_prefix_lm
from furina.evaluation.evaluation import Engine
from furina.evaluation.independence import check_causal
from furina.model.inference import evaluation_mode
from furina.progress import advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOFTMAX_DTYPE = "float32"
"""Log-probabilities of a bf16 model would otherwise be rounded to 8 bits and tie."""


@contextmanager
def live_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    engine: Engine = "shared",
) -> Iterator[Any]:
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
        kind = shared_prefix_lm() if engine == "shared" else fitted_lm()
        lm = kind(
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
    """Return a copy that has the tokens without which HFLM ends in a TypeError; it is changed."""
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
    """Leave of lm-eval's talk its errors; its bar of requests tells `furina.progress` instead."""
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface

    logger = logging.getLogger("lm_eval")
    level = logger.level
    chatty = (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface)
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
    """Return a kind of tqdm that shows nothing, and tells of what it counts if that has a unit."""

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if unit and self.total:
                advance(self.n, self.total, unit)

    return Silent
