"""How fast this machine trains, reads and writes: timed on two layers, in about a second a method.

The layers are SmolLM2-135M's, with as large a part of its vocabulary as they are of its depth.
A rate is the FLOPs of the matrix products over the seconds, so what is beside them slows it down.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW

from furina.backbones.architectures import ARCHITECTURES
from furina.backbones.load import DTYPES
from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.model.auxiliary import after_step, auxiliary_loss
from furina.model.inference import evaluation_mode
from furina.model.inject import adapt
from furina.model.parameters import parameter_groups
from furina.plan.counting import Count
from furina.training import answer_loss, training_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKBONE, LAYERS = "smollm2-135m-instruct", 2
ROWS, ANSWERS = 8, 8
"""Rows, and the tokens of each that are predicted."""
TOKENS = 512
"""Tokens of all rows at which every method is timed; LoRA is at others, too."""
WARMING, REPEATS = 2, 5


class Speed(NamedTuple):
    """FLOP/s of a method's optimiser steps and of reading with its adapter and without."""

    training: float
    adapted: float
    plain: float


@cache
@torch.random.fork_rng(devices=[])
def speed(method: str, options: str, dtype: str, tokens: int = TOKENS) -> Speed:
    """Time a method with its `options` (JSON) in `dtype`, a micro-batch of `tokens` a step.

    One that does not fit into two layers is taken to be as fast as LoRA.
    """
    model, length = _layers(dtype), tokens // ROWS
    batch = _batch(length)
    plain = _reading(model, batch)
    try:
        adapt(model, method, seed=0, **json.loads(options))
    except ConfigurationError:
        adapt(model, "lora", seed=0, rank=128)
    optimizer = AdamW(parameter_groups(model, 1e-4))

    def step() -> None:
        loss = answer_loss(model, batch)[0] + auxiliary_loss(model)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)

    model.train()
    with training_attention(model, length):
        training = _rate(model, step)
    torch.nn.Module.eval(model)
    return Speed(training, _reading(model, batch), plain)


@cache
def bandwidth(dtype: str) -> float:
    """Return the bytes/s at which weights are read where tokens are written one by one."""
    model = _layers(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        return size / _seconds(lambda: model(input_ids=token, use_cache=False))


def of_run(config: RunConfig, tokens: float = TOKENS) -> Speed:
    """Return how fast a run of resolved dtype is here, with micro-batches of so many tokens.

    Few tokens slow every method down as they do LoRA.
    """
    lora = "lora", "{}", config.dtype
    options = json.dumps(config.adapter, sort_keys=True)
    found = speed(*lora) if config.is_base else speed(config.method, options, config.dtype)
    near = 2 ** round(math.log2(min(max(tokens, 128), 2048)))
    slower = speed(*lora, near).training / speed(*lora).training if near != TOKENS else 1.0
    return found._replace(training=found.training * slower)


@torch.random.fork_rng(devices=[])
def _layers(dtype: str) -> PreTrainedModel:
    """Return the layers with random weights, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(ARCHITECTURES[BACKBONE]))
    config.vocab_size = config.vocab_size * LAYERS // config.num_hidden_layers
    config.num_hidden_layers = LAYERS
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])  # type: ignore[no-untyped-call]
    torch.nn.Module.eval(model)
    return model


def _batch(length: int) -> dict[str, Tensor]:
    ids = torch.arange(ROWS * length).reshape(ROWS, length)
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWERS:] = ids[:, -ANSWERS:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _reading(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    def read() -> None:
        answer_loss(model, batch)

    with evaluation_mode(model), torch.no_grad():
        return _rate(model, read)


def _rate(model: PreTrainedModel, call: Callable[[], Any]) -> float:
    with Count(model) as counted:
        call()
    rate: float = counted.flops / _seconds(call)
    return rate


def _seconds(call: Callable[[], Any]) -> float:
    """Return the median of some calls after those that prepare."""
    times = []
    for _ in range(WARMING + REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARMING:])
