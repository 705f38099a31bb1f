"""Torch's defaults, which other code in a process may have set, change nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import furina
from furina.adapters import methods
from furina.errors import NotMergeableError
from tests.helpers import small, tiny_llama, tokens

every_method = pytest.mark.parametrize("method", methods())


@pytest.fixture(autouse=True)
def own_defaults() -> Iterator[None]:
    """Give every other test torch's own defaults back."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@every_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_initial_adapter_of_a_seed_does_not_depend_on_the_default_dtype(
    method: str, dtype: torch.dtype
) -> None:
    expected = furina.adapter_state_dict(furina.adapt(tiny_llama(), small(method), seed=0))
    model = tiny_llama()
    torch.set_default_dtype(dtype)
    found = furina.adapter_state_dict(furina.adapt(model, small(method), seed=0))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_method
def test_a_model_is_adapted_trained_and_merged_on_another_than_the_default_device(
    method: str,
) -> None:
    """The default is one on which nothing can be computed, so whatever lands there shows."""
    model, batch = tiny_llama(), tokens()
    torch.set_default_device("meta")
    furina.adapt(model, small(method, dropout=0.1), seed=0)
    with torch.no_grad():
        for parameter in furina.adapter_parameters(model).values():
            parameter.add_(0.01)
    loss = model.train()(**batch).loss + furina.auxiliary_loss(model).to("cpu")
    loss.backward()
    furina.after_step(model)
    tensors = [*furina.adapter_state_dict(model).values(), loss]
    tensors += [p.grad for p in furina.adapter_parameters(model).values() if p.grad is not None]
    assert len(tensors) > 2 and {tensor.device.type for tensor in tensors} == {"cpu"}
    try:
        furina.merge(model.eval())
    except NotMergeableError:
        return
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
