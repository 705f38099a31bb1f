"""What every method keeps inside a whole model, its auxiliary loss included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import methods
from furina.model.state import state_of
from furina.training.gradients import gradient_ratio
from tests.adapters.blocks import mixed_ffn
from tests.helpers import BACKBONES, RowByRow, perturb, small, task_loss, tokens

every_method = pytest.mark.parametrize("method", methods())
LOSS_ON = {"loramoe": {"balance_coefficient": 0.1, "task_type": 1}}
WITH_LOSS = [name for name in methods() if small(name, **LOSS_ON.get(name, {})).has_auxiliary_loss]
assert {"furina", "loramoe", "mixlora", "mola"} <= set(WITH_LOSS)


def model_of(method: str, dtype: torch.dtype = torch.float64, backbone: str = "llama") -> nn.Module:
    """Return a perturbed model with the method's auxiliary loss on, if it has one."""
    config = small(method, **LOSS_ON.get(method, {}))
    model = furina.adapt(BACKBONES[backbone](dtype), config, seed=0)
    perturb(model)
    return model


def losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the task loss, the auxiliary loss and the gradients of their sum."""
    model.zero_grad()
    task = task_loss(model, batch)
    auxiliary = furina.auxiliary_loss(model)
    (task + auxiliary).backward()
    gradients = {n: p.grad.clone() for n, p in furina.adapter_parameters(model).items()}
    return task.detach(), auxiliary.detach(), gradients


def padded(batch: dict[str, Tensor], columns: int, id_: int) -> dict[str, Tensor]:
    fill = {"input_ids": id_, "attention_mask": 0, "labels": -100}
    return {
        name: torch.cat([value, value.new_full((len(value), columns), fill[name])], dim=1)
        for name, value in batch.items()
    }


@every_method
def test_padding_changes_no_output_loss_or_gradient(method: str) -> None:
    model, batch = model_of(method).train(), tokens()
    expected, real = losses(model, batch), batch["attention_mask"] != 0
    logits = model(**batch).logits[real]
    for id_ in (0, 17):
        longer = padded(batch, 3, id_)
        torch.testing.assert_close(losses(model, longer), expected, rtol=1e-9, atol=1e-12)
        found = model(**longer).logits[longer["attention_mask"] != 0]
        torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-11)


@every_method
@pytest.mark.parametrize("backbone", BACKBONES)
def test_checkpointing_changes_no_loss_or_gradient(method: str, backbone: str) -> None:
    model, batch = model_of(method, backbone=backbone).train(), tokens()
    expected = losses(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(losses(model, batch), expected, rtol=1e-9, atol=1e-12)


@every_method
def test_two_evaluations_are_identical_and_keep_nothing(method: str) -> None:
    model, batch = model_of(method, torch.float32).eval(), tokens()
    state = copy.deepcopy(furina.adapter_state_dict(model))
    with torch.no_grad():
        first = model(**batch).logits
        assert torch.equal(model(**batch).logits, first)
    furina.after_step(model)
    for name, tensor in furina.adapter_state_dict(model).items():
        assert torch.equal(tensor, state[name]), name


@every_method
@pytest.mark.parametrize("width", [1, 5])
def test_no_weight_is_multiplied_row_by_row(method: str, width: int) -> None:
    """As matmul does it with a frozen weight and a strided input, on a CPU copying the weight."""
    model, ids = model_of(method, torch.bfloat16).eval(), torch.arange(3 * width).view(3, width)
    with torch.no_grad(), furina.evaluation_mode(model):
        model(ids)  # what is made once, in batched products or not
        with RowByRow() as counted:
            model(ids)
    assert counted.shapes == []


@every_method
def test_a_deep_copy_gives_the_same_and_lives_on_its_own(method: str) -> None:
    model, batch = model_of(method), tokens()
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, expected)
    with torch.no_grad():
        for parameter in furina.adapter_parameters(twin).values():
            parameter.add_(1.0)
    assert not torch.equal(twin(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected)
    losses(twin.train(), batch)
    furina.after_step(twin)
    assert torch.equal(model(**batch).logits, expected)


@every_method
def test_autocast_trains_and_keeps_parameters_and_losses_fp32(method: str) -> None:
    model, batch = model_of(method, torch.float32).train(), tokens()
    exact = losses(copy.deepcopy(model), batch)
    with torch.autocast("cpu", torch.bfloat16):
        task, auxiliary = task_loss(model, batch), furina.auxiliary_loss(model)
    (task + auxiliary).backward()
    assert auxiliary.dtype in (torch.float32, torch.float64)
    assert task.item() == pytest.approx(exact[0].item(), rel=0.05)
    assert auxiliary.item() == pytest.approx(exact[1].item(), rel=0.05, abs=1e-6)
    for name, parameter in furina.adapter_parameters(model).items():
        assert parameter.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@every_method
def test_the_pull_of_every_auxiliary_loss_can_be_measured(method: str) -> None:
    model, batch = model_of(method).train(), tokens()
    ratio = gradient_ratio(model, [batch])["ratio"]
    assert (ratio is not None and ratio > 0) == state_of(model).config.has_auxiliary_loss


@pytest.mark.parametrize("method", WITH_LOSS)
def test_the_gradient_of_the_auxiliary_loss_is_its_own(method: str) -> None:
    """Checked by a finite difference along a random direction, in a block that is all float64."""
    model = mixed_ffn(small(method, **LOSS_ON.get(method, {}))).train()
    batch = {
        "x": torch.randn(3, 5, 11, dtype=torch.float64),
        "attention_mask": tokens(3, 5)["attention_mask"],
    }
    model(**batch)
    furina.auxiliary_loss(model).backward()
    parameters = [p for p in furina.adapter_parameters(model).values() if p.grad is not None]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
    values, size = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction, strict=True):
                parameter.add_(way, alpha=sign * size)
        model(**batch)
        values.append(furina.auxiliary_loss(model).item())
    difference = (values[0] - values[1]) / (2 * size)
    assert difference == pytest.approx(slope.item(), rel=1e-4, abs=1e-7)
