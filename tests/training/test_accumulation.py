"""Norms and directions made once for several micro-batches give the gradients of separate ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import methods
from furina.errors import ConfigurationError
from furina.model.state import state_of
from tests.helpers import perturb, small, tiny_qwen2, tokens
from tests.training.helpers import gradients

LOSS_ON = {"loramoe": {"balance_coefficient": 0.1, "task_type": 1}}


def adapted(method: str, **options: object) -> nn.Module:
    config = small(method, **LOSS_ON.get(method, {}), **options)
    model = furina.adapt(tiny_qwen2(torch.float64), config, seed=0).train()
    perturb(model)
    return model


def backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    (model(**batch).loss + furina.auxiliary_loss(model)).backward()


@pytest.mark.parametrize("method", methods())
def test_the_accumulated_gradients_are_those_of_separate_forwards(method: str) -> None:
    model, batches = adapted(method), [tokens(seed=seed) for seed in range(3)]
    for batch in batches:
        backward(model, batch)
    expected = gradients(model)
    model.zero_grad()
    with furina.accumulating(model):
        for batch in batches:
            backward(model, batch)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-12)


def test_furina_and_dora_derive_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("furina", "dora"):
        model, count = adapted(method), []
        layer = next(iter(state_of(model).layers.values()))
        derive = type(layer).derive
        monkeypatch.setattr(
            type(layer), "derive", lambda self, derive=derive, c=count: c.append(1) or derive(self)
        )
        with furina.accumulating(model):
            for seed in range(3):
                backward(model, tokens(seed=seed))
        assert len(count) == len(state_of(model).layers)


def test_checkpointing_inside_recomputes_with_what_is_shared() -> None:
    model, batch = adapted("furina"), tokens()
    backward(model, batch)
    expected = gradients(model)
    model.zero_grad()
    model.activation_checkpointing_enable({"use_reentrant": False})
    with furina.accumulating(model):
        backward(model, batch)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)


def test_an_error_inside_leaves_no_gradient_and_nothing_shared() -> None:
    model = adapted("furina")
    with pytest.raises(KeyError), furina.accumulating(model):
        backward(model, tokens())
        raise KeyError
    assert state_of(model).tracker.shared is None
    assert not gradients(model).keys() & {
        name for name in furina.adapter_parameters(model) if name.endswith("lora_Bt")
    }


def test_a_backward_after_the_block_is_an_error_and_not_a_lost_gradient() -> None:
    model = adapted("furina")
    with furina.accumulating(model):
        loss = model(**tokens()).loss
    with pytest.raises(ConfigurationError, match=r"call it inside the block"):
        loss.backward()


@pytest.mark.parametrize("activity", ["l2", "l1", "per_unit"])
@pytest.mark.parametrize("outside", ["eval mode", "no gradients"])
def test_the_mode_in_which_the_block_begins_does_not_matter(activity: str, outside: str) -> None:
    model, batch = adapted("furina", activity=activity), tokens()
    backward(model, batch)
    expected = gradients(model)
    model.zero_grad()
    with torch.set_grad_enabled(outside != "no gradients"):
        model.train(outside != "eval mode")
        with furina.accumulating(model), torch.enable_grad():
            backward(model.train(), batch)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-12)
