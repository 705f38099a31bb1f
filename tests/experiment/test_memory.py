"""The closed forms of memory are what a training step really keeps and holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from furina.adapters import AdapterConfig, configure, methods
from furina.adapters.furina import FurinaConfig
from furina.adapters.kept import FULL
from furina.backbones.load import load_backbone
from furina.experiment.activations import MicroBatch, activation_bytes
from furina.experiment.memory import TRAINED, scoring_memory, training_memory
from furina.experiment.shapes import Adapted, Decoder
from tests.experiment.counted import Live, batch_of, kept, loss_of
from tests.experiment.test_flops import adapted_as, fixed
from tests.helpers import small

ROWS, LENGTH, ANSWER = 3, 16, 2


class Kept(NamedTuple):
    found: int
    expected: int
    sides: Decoder
    adapted: Adapted


def derived(sides: Decoder, found: Adapted, batch: MicroBatch) -> int:
    """Return what a method makes of its parameters for the forward."""
    adapter = training_memory(sides, found, batch).adapter
    return adapter - TRAINED * found.trainable - FULL * found.kept


def kept_by(model: Any, config: AdapterConfig, batch: MicroBatch) -> Kept:
    """Count what is kept of one micro-batch, but what the loss keeps of its logits."""
    sides, found = adapted_as(model, config)
    with kept(model) as total:
        loss = loss_of(model, batch_of(model, batch.rows, batch.length, ANSWER, padded=True))
        counted = total()
    assert loss.requires_grad
    answers = batch.rows * ANSWER  # log-probabilities, two indices, and the weight of them all
    counted -= answers * (FULL * sides.vocabulary + 2 * 8) + FULL
    expected = activation_bytes(sides, found, batch) + derived(sides, found, batch)
    return Kept(counted, expected, sides, found)


def tiny_kept(config: AdapterConfig, dtype: str, attention: str) -> Kept:
    model = load_backbone("tiny-llama", dtype, attention=attention).requires_grad_(False).train()
    size = getattr(torch, dtype).itemsize
    return kept_by(model, config, MicroBatch(ROWS, LENGTH, ANSWER, size, attention))


def statistics_bytes(config: FurinaConfig, linears: int, tokens: int) -> int:
    """Return what the selection loss keeps of its sums: some numbers of each linear and token."""
    return linears * (FULL * (1 + 3 * config.num_routed_experts) + 1) + FULL * (tokens + 1)


def assert_exact(counted: Kept, config: AdapterConfig, tokens: int) -> None:
    linears = len(counted.adapted.linears)
    left = statistics_bytes(config, linears, tokens) if isinstance(config, FurinaConfig) else 0
    assert counted.found - counted.expected == left


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "furina"])
def test_what_is_kept_is_its_closed_form_to_the_byte(
    method: str, dtype: str, attention: str
) -> None:
    config = small(method)
    assert_exact(tiny_kept(config, dtype, attention), config, ROWS * LENGTH)


@pytest.mark.parametrize("method", ["lora", "furina"])
def test_it_is_so_at_the_papers_size_with_dropout(method: str) -> None:
    model = fixed("Qwen/Qwen2-7B", "meta")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    options = {"rank": 128} if method == "lora" else {"rank": 16, "num_experts": 8}
    config = configure(method, options)
    assert config.dropout > 0
    counted = kept_by(model, config, MicroBatch(4, 128, ANSWER, 2, "eager"))
    assert counted.expected > 3e8
    assert_exact(counted, config, 4 * 128)


@pytest.mark.parametrize("method", methods())
def test_every_method_keeps_about_what_is_said(method: str) -> None:
    for dtype in ("float32", "bfloat16"):
        for dropout in (0.0, 0.05) if method in ("dora", "mixlora") else (0.0,):
            counted = tiny_kept(small(method, dropout=dropout), dtype, "eager")
            assert 0.85 * counted.expected < counted.found < 1.02 * counted.expected, dtype


def test_what_only_some_linears_read_is_kept_for_these_alone() -> None:
    model = load_backbone("tiny-llama", "float32", attention="eager").requires_grad_(False).train()
    sides, found = adapted_as(model, small("lora"), targets=["v_proj", "down_proj"])
    batch = MicroBatch(ROWS, LENGTH, ANSWER, 4, "eager")
    every = tiny_kept(small("lora"), "float32", "eager")
    fewer = every.expected - activation_bytes(sides, found, batch)
    rest = sides.layers * batch.tokens * 4 * (sides.queries + sides.hidden + 5 * 3)
    assert fewer == rest  # what o, and what gate and up read, and A x of five linears


def live_llama(dtype: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM._from_config(
        config, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    return model.requires_grad_(False).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", methods())
def test_a_step_peaks_where_the_plan_says(method: str, checkpointing: bool) -> None:
    rows, length, answer = 4, 64, 4
    dtype, attention = ("float32", "eager") if method == "lora" else ("bfloat16", "sdpa")
    model = live_llama(dtype, attention)
    sides, found = adapted_as(model, configure(method, {"dropout": 0.0}))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = batch_of(model, rows, length, answer, padded=True)
    with Live(model) as live:
        loss_of(model, batch).backward()
    size = getattr(torch, dtype).itemsize
    said = training_memory(
        *(sides, found, MicroBatch(rows, length, answer, size, attention, checkpointing))
    )
    gradients = 4 * found.trainable
    assert live.bytes >= gradients
    before = said.weights + TRAINED * found.trainable + FULL * found.kept
    assert 0.95 * live.peak < said.total - before + gradients < 1.3 * live.peak


def test_parameters_take_sixteen_bytes_and_may_be_shared_out() -> None:
    model = live_llama("bfloat16", "sdpa")
    sides, found = adapted_as(model, configure("lora", {"rank": 4}))
    batch = MicroBatch(1, 8, 1, 2)
    whole, half = (training_memory(sides, found, batch, shards) for shards in (1, 2))
    assert whole.weights == 2 * sides.parameters == 2 * half.weights
    assert whole.adapter == 16 * found.trainable == 2 * half.adapter
    assert whole.activations == half.activations
    assert whole.total == sum((whole.weights, whole.adapter, whole.activations, whole.working))


def test_scoring_keeps_keys_and_values_of_what_is_written() -> None:
    sides = Decoder(1000, layers=3, hidden=8, heads=2, queries=8, keys=4, ffn=16, vocabulary=32,
                    attention="sdpa")  # fmt: skip
    read, written = scoring_memory(sides, None, 2), scoring_memory(sides, None, 2, written=10)
    assert written.total - read.total == 10 * 3 * 2 * 4 * 2
    assert (read.weights, read.adapter, read.activations) == (2000, 0, 0)
