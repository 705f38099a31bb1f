from __future__ import annotations

import pytest
import torch

import furina
from furina.errors import ConfigurationError, DataError
from furina.training import answer_loss, gradient_ratio
from tests.training.helpers import tiny, windows


def routed_norm(loss: torch.Tensor, model: torch.nn.Module) -> float:
    """Norm of the gradient on A and B without the shared expert, the first of rank 4."""
    named = furina.adapter_parameters(model)
    factors = {name: p for name, p in named.items() if name.endswith(("lora_A", "lora_Bt"))}
    gradients = torch.autograd.grad(loss, list(factors.values()), retain_graph=True)
    return float(torch.stack([gradient[4:].norm() for gradient in gradients]).norm())


def test_ratio_is_that_of_the_two_gradients_on_routed_factors() -> None:
    model, window = tiny(), windows(1)[0]
    figures = gradient_ratio(model, window)
    loss, _ = answer_loss(model, window[0])
    auxiliary, task = routed_norm(furina.auxiliary_loss(model), model), routed_norm(loss, model)
    assert figures["auxiliary"] == pytest.approx(auxiliary, rel=1e-4)
    assert figures["task"] == pytest.approx(task, rel=1e-4)
    assert figures["ratio"] == pytest.approx(auxiliary / task, rel=1e-4)


def test_measuring_leaves_gradients_mode_and_random_state_alone() -> None:
    model = tiny(dropout=0.1).eval()
    random_state = torch.get_rng_state()
    gradient_ratio(model, windows(1, micro_batch_size=3)[0])
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_measuring_works_under_gradient_checkpointing() -> None:
    plain, checkpointed = tiny(), tiny()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    window = windows(1, micro_batch_size=3)[0]
    assert gradient_ratio(checkpointed, window) == pytest.approx(
        gradient_ratio(plain, window), rel=1e-5
    )


def test_a_window_without_answers_and_a_merged_adapter_are_one_sentence() -> None:
    window = windows(1, micro_batch_size=3)[0]
    merged = tiny()
    furina.merge(merged)
    with pytest.raises(ConfigurationError, match=r"furina\.unmerge"):
        gradient_ratio(merged, window)
    for batch in window:
        batch["labels"].fill_(-100)
    for empty in (window, []):
        with pytest.raises(DataError, match="no answer token"):
            gradient_ratio(tiny(), empty)


def test_ratio_is_undefined_without_an_auxiliary_loss_or_before_v_moved() -> None:
    window = windows(1)[0]
    assert gradient_ratio(tiny("lora"), window)["ratio"] is None
    start = tiny()
    with torch.no_grad():
        for name, parameter in furina.adapter_parameters(start).items():
            if name.endswith("magnitude"):
                parameter.zero_()
            elif name.endswith("lora_Bt"):
                parameter[:4] = 0
    assert gradient_ratio(start, window)["auxiliary"] == 0
