"""Compiled layers: one graph without breaks for all shapes, and the numbers of the eager run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.errors import ConfigurationError
from furina.model.compilation import CompiledDecoder
from furina.training.loss import answer_loss
from tests.helpers import Chain, perturb, small, tiny_llama, tokens
from tests.training.helpers import RandomQuestions, fit, tiny

SHAPES = ((2, 12), (3, 17), (4, 9))
METHODS = [
    name if name == "furina" else pytest.param(name, marks=pytest.mark.slow)
    for name in furina.methods()
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Forget every graph, and make a second compilation of one an error."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def one_layer(model: Any) -> Any:
    """Drop all decoder layers but the first: tracing takes as long for each."""
    model.model.layers = model.model.layers[:1]
    return model


def adapted(method: str, **options: Any) -> nn.Module:
    model = one_layer(tiny_llama(torch.float64))
    furina.adapt(model, small(method, **options))
    perturb(model)
    return model.train()


def losses_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return task loss, auxiliary loss and all gradients of their sum."""
    task, auxiliary = answer_loss(model, batch)[0], furina.auxiliary_loss(model)
    (task + auxiliary).backward()
    gradients = [p.grad for p in furina.adapter_parameters(model).values() if p.grad is not None]
    model.zero_grad()
    return [task.detach(), auxiliary.detach(), *gradients]


def assert_like_eager(method: str, backend: str) -> None:
    model = adapted(method)
    compiled = CompiledDecoder(model, backend)
    for shape in SHAPES:
        batch = tokens(*shape)
        expected = losses_and_gradients(model, batch)
        with compiled.active():
            found = losses_and_gradients(model, batch)
        assert len(found) == len(expected) > 2
        torch.testing.assert_close(found, expected)
        furina.after_step(model)
    assert graphs() == 1


@pytest.mark.parametrize("method", METHODS)
def test_three_shapes_share_one_graph_that_equals_the_eager_run(method: str) -> None:
    assert_like_eager(method, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "furina"])
def test_inductor_equals_the_eager_run(method: str) -> None:
    assert_like_eager(method, "inductor")


def test_forwards_outside_run_as_they_are() -> None:
    model = adapted("lora")
    compiled = CompiledDecoder(model, "eager")
    with torch.no_grad():
        expected = model(**tokens(2, 8)).logits
        assert graphs() == 0
        with compiled.active():
            found = model(**tokens(2, 8)).logits
        assert graphs() == 1
        model(**tokens(1, 6))
    assert graphs() == 1
    torch.testing.assert_close(found, expected)


def test_a_forward_that_somebody_put_on_the_decoder_runs_inside_and_stays_afterwards() -> None:
    model = adapted("lora")
    decoder = model.get_decoder()
    own = decoder.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        output.last_hidden_state = 2 * output.last_hidden_state
        return output

    decoder.forward = doubled
    with torch.no_grad():
        expected = model(**tokens(2, 8)).logits
        with CompiledDecoder(model, "eager").active():
            inside = model(**tokens(2, 8)).logits
        afterwards = model(**tokens(2, 8)).logits
    torch.testing.assert_close([inside, afterwards], [expected, expected])
    assert decoder.forward is doubled


def test_dropout_is_drawn_anew_in_every_compiled_forward() -> None:
    model = adapted("lora", dropout=0.5)
    with CompiledDecoder(model, "eager").active():
        one, other = (model(**tokens(2, 8)).logits for _ in range(2))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_training_is_the_same_compiled(tmp_path: Path, micro_batch_size: int | None) -> None:
    losses = {}
    for backend in (None, "eager"):
        model = tiny("furina", "float64")
        module = furina.FinetuneModule(model, 1e-2, compile_backend=backend)
        data = RandomQuestions(8, micro_batch_size)
        fit(module, tmp_path, data, max_steps=2)
        losses[backend] = [p.detach() for p in furina.adapter_parameters(model).values()]
    assert graphs() == 1
    torch.testing.assert_close(losses["eager"], losses[None])


def _checkpointing() -> nn.Module:
    model = tiny_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return furina.adapt(model, "lora", rank=2)


def _without_decoder() -> nn.Module:
    return furina.adapt(Chain(), "lora", rank=2, targets=["first"])


@pytest.mark.parametrize(
    ("make", "backend", "message"),
    [
        (lambda: adapted("lora"), "inducter", "inducter.*inductor"),
        (_checkpointing, "eager", "turn gradient checkpointing off"),
        (_without_decoder, "eager", "no decoder"),
    ],
)
def test_what_cannot_be_compiled_is_refused(make: Any, backend: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        CompiledDecoder(make(), backend)
