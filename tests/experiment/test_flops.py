"""The closed forms of FLOPs are what a training step really multiplies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterConfig, methods
from furina.adapters.flops import adapter_flops
from furina.backbones.load import load_backbone, meta_backbone
from furina.experiment.flops import forward_flops, step_flops
from furina.experiment.shapes import Adapted, Decoder, Linear, decoder
from furina.model.state import state_of
from tests.experiment.counted import batch_of, flops, loss_of
from tests.helpers import small, variants

ROWS, LENGTH, ANSWER = 2, 12, 3
TOKENS = ROWS * LENGTH
MORE: dict[str, dict[str, Any]] = {
    "dora": {"dropout": 0.5},
    "loramoe": {"balance_coefficient": 0.1, "task_type": 1},
    "furina": {"rank": 40},  # above `directions.DENSE` columns
}
"""What the methods' switches do not reach."""


def fixed(name: str = "tiny-llama", device: str = "cpu") -> Any:
    if device == "meta":
        model = meta_backbone(name, "bfloat16")
        model.set_attn_implementation("eager")
    else:
        model = load_backbone(name, "float32", attention="eager")
    return model.requires_grad_(False).train()


def adapted_as(model: Any, config: AdapterConfig | str, **options: Any) -> tuple[Decoder, Adapted]:
    sides = decoder(model.config, sum(p.numel() for p in model.parameters()))
    furina.adapt(model, config, seed=0, **options)
    with torch.no_grad():
        for tensor in furina.adapter_parameters(model).values():
            tensor.normal_(std=0.02)
    state = state_of(model)
    linears = tuple(
        Linear(name, layer.base.in_features, layer.base.out_features)
        for name, layer in state.layers.items()
    )
    return sides, Adapted(state.config, linears, furina.describe(model).trainable, 0)


def counted(model: nn.Module, rows: int = ROWS, length: int = LENGTH, answer: int = ANSWER) -> int:
    batch = batch_of(model, rows, length, answer)
    return flops(lambda: loss_of(model, batch).backward())


@pytest.mark.parametrize("method", methods())
def test_a_step_of_every_method_is_its_closed_form(method: str) -> None:
    for config in (*variants(method, together=1), small(method, **MORE.get(method, {}))):
        model = fixed()
        model.enable_input_require_grads()  # as if a layer came before the first
        expected = step_flops(*adapted_as(model, config), TOKENS, LENGTH, ROWS * ANSWER)
        assert counted(model) == expected, config


@pytest.mark.parametrize("backbone", ["tiny-llama", "tiny-qwen2"])
@pytest.mark.parametrize(
    ("method", "rank", "options"),
    [("lora", 8, {"rank": 8}), ("furina", 8, {"rank": 2, "num_experts": 4, "top_k": 2})],
)
def test_the_embeddings_get_no_gradient_which_is_all_that_is_said_too_much(
    backbone: str, method: str, rank: int, options: dict[str, Any]
) -> None:
    model = fixed(backbone)
    sides, found = adapted_as(model, method, **options)
    outputs = sides.queries + 2 * sides.keys
    spared = 2 * TOKENS * sides.hidden * (outputs + 3 * rank)
    expected = step_flops(sides, found, TOKENS, LENGTH, ROWS * ANSWER)
    assert counted(model) == expected - spared


def test_a_step_at_the_papers_size_is_its_closed_form() -> None:
    model = fixed("meta-llama/Llama-3.2-3B", "meta")
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    sides, found = adapted_as(model, "furina", rank=16, num_experts=8)
    outputs = sides.queries + 2 * sides.keys
    tokens = 2 * 64
    expected = step_flops(sides, found, tokens, 64, 2)
    assert counted(model, 2, 64, 1) == expected - 2 * tokens * sides.hidden * (outputs + 3 * 128)


@pytest.mark.parametrize("method", ["lora", "furina"])
def test_recomputation_is_one_forward_more(method: str) -> None:
    model = fixed()
    model.enable_input_require_grads()
    sides, found = adapted_as(model, small(method))
    model.activation_checkpointing_enable({"use_reentrant": False})
    once = step_flops(sides, found, TOKENS, LENGTH, ROWS * ANSWER)
    again = step_flops(sides, found, TOKENS, LENGTH, ROWS * ANSWER, checkpointing=True)
    exact = method == "lora"  # of FURINA's norms and selection not a third is the forward's
    assert counted(model) == pytest.approx(again, rel=1e-12 if exact else 0.02)
    assert again > 1.2 * once


@pytest.mark.parametrize("method", ["lora", "molora", None])
def test_reading_is_two_flops_a_weight_and_attention(method: str | None) -> None:
    model = fixed().eval()
    sides = decoder(model.config, 0)
    found = adapted_as(model, small(method))[1] if method else None
    batch = batch_of(model, ROWS, LENGTH, ANSWER)

    @torch.no_grad()
    def read() -> Tensor:
        logits: Tensor = model(**batch.inputs, logits_to_keep=ANSWER).logits
        return logits

    assert flops(read) == forward_flops(sides, found, TOKENS, LENGTH, ROWS * ANSWER)


def test_a_new_method_has_six_flops_for_each_parameter_and_token() -> None:
    config = copy.copy(small("lora"))
    assert adapter_flops.dispatch(AdapterConfig)(config, 10, 7, 5) == 6 * 10 * 3 * (7 + 5)
