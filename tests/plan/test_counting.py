"""What is counted on two layers without weights is what a whole model multiplies and holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import furina
from furina.adapters import methods
from furina.plan.counting import (
    EAGER,
    Count,
    Method,
    Shape,
    adapted_of,
    batch_of,
    cached_numbers,
    parameters_of,
    reading,
    training,
)
from furina.training.loss import answer_loss

SHAPE = Shape(3, 144, 5)
"""None of those that are counted."""
SLOW = pytest.mark.slow
QUICK = ("lora", "furina", "mixlora")
every_method = pytest.mark.parametrize(
    "method", [m if m in QUICK else pytest.param(m, marks=SLOW) for m in methods()]
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    ).save_pretrained(folder)
    return str(folder)


def real(backbone: str, method: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(backbone)
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation=EAGER)
    model.requires_grad_(False)
    if method is not None:
        furina.adapt(model, method, seed=0)
    return model


def counted_step(model: PreTrainedModel) -> Count:
    for parameter in furina.adapter_parameters(model).values():
        parameter.grad = torch.zeros_like(parameter)
    with Count(model.train()) as counted:
        loss = answer_loss(model, batch_of(model, SHAPE))[0] + furina.auxiliary_loss(model)
        loss.backward()
    return counted


@every_method
def test_a_step_of_every_method_costs_what_was_counted(method: str, backbone: str) -> None:
    said = training(backbone, Method(method, "{}", None), "float32", EAGER)
    found = counted_step(real(backbone, method))
    assert found.flops == said.step.of(SHAPE)
    assert said.peak.of(SHAPE) == pytest.approx(found.peak, rel=0.1)


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=SLOW) for m in ("furina", "mola"))]
)
def test_recomputation_saves_memory_and_costs_a_forward(method: str, backbone: str) -> None:
    key: Any = (backbone, Method(method, "{}", None), "float32", EAGER)
    plain, again = training(*key), training(*key, checkpointing=True)
    model = real(backbone, method)
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = counted_step(model)
    assert found.flops == again.step.of(SHAPE) > plain.step.of(SHAPE)
    assert again.peak.of(SHAPE) == pytest.approx(found.peak, rel=0.1)
    assert again.peak.of(SHAPE) < 0.8 * plain.peak.of(SHAPE)


def test_what_micro_batches_share_is_held_all_the_time(backbone: str) -> None:
    key: Any = (backbone, Method("furina", "{}", None), "bfloat16", EAGER)
    once, shared = training(*key), training(*key, accumulates=True)
    assert shared.peak.of(SHAPE) > once.peak.of(SHAPE)


@every_method
def test_reading_costs_what_was_counted(method: str, backbone: str) -> None:
    said = reading(backbone, Method(method, "{}", None), "float32")
    model = real(backbone, method).eval()

    with torch.no_grad(), Count(model) as counted:
        answer_loss(model, batch_of(model, SHAPE))
    assert counted.flops == said.forward.of(SHAPE)


def test_parameters_and_the_cache_are_the_models(backbone: str) -> None:
    model = real(backbone, "lora")
    found = adapted_of(backbone, Method("lora", "{}", None))
    assert found.trainable == sum(p.numel() for p in furina.adapter_parameters(model).values())
    assert parameters_of(backbone) + found.trainable == sum(p.numel() for p in model.parameters())
    assert cached_numbers(backbone) == 4 * 2 * 2 * 32  # layers, keys and values, heads, their width


def test_layers_that_are_not_alike_are_all_counted(tmp_path: Path, backbone: str) -> None:
    assert not adapted_of(backbone, Method("mola", "{}", None)).alike
    assert adapted_of(backbone, Method("furina", "{}", None)).alike
    targets = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.*_proj")
    some = Method("lora", "{}", targets)
    assert not adapted_of(backbone, some).alike
    model = real(backbone)
    furina.adapt(model, "lora", targets=targets, seed=0)
    said = training(backbone, some, "float32", EAGER)
    assert counted_step(model).flops == said.step.of(SHAPE)
