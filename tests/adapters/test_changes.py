"""Every change of a parameter or weight reaches the next forward, however it was made."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.errors import ConfigurationError
from furina.model.inference import evaluation_mode
from furina.model.state import state_of
from tests.helpers import BACKBONES, chain, perturb, small, task_loss, tokens


def adapted(method: str = "furina", dtype: torch.dtype = torch.float64, **options: object):
    model = furina.adapt(BACKBONES["llama"](dtype), small(method, **options), seed=0)
    perturb(model)
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tokens()).logits
    return found


def written_through_data(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data.mul_(0.5)


def vector_to_parameters(parameters: list[nn.Parameter]) -> None:
    vector = nn.utils.parameters_to_vector(parameters)
    nn.utils.vector_to_parameters(0.5 * vector, parameters)


def swapped(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        average = parameter.detach() * 0.5
        parameter.data, average = average, parameter.data


def fused_step(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    optimizer.step()
    optimizer.zero_grad()


def numpy_view(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        array = parameter.detach().numpy()
        array *= 0.5


@pytest.mark.parametrize(
    "write", [written_through_data, vector_to_parameters, swapped, fused_step, numpy_view]
)
@pytest.mark.parametrize("method", furina.methods())
def test_a_forward_follows_every_way_of_writing_parameters(
    method: str, write: Callable[[list[nn.Parameter]], None]
) -> None:
    model = adapted(method)
    before = logits(model)
    write(list(furina.adapter_parameters(model).values()))
    found = logits(model)
    twin = adapted(method)
    furina.load_adapter_state_dict(twin, furina.adapter_state_dict(model))
    assert not torch.equal(found, before)
    assert torch.equal(found, logits(twin))


def test_a_forward_without_gradients_before_the_backward_does_not_outlive_the_step() -> None:
    model, batch = adapted().train(), tokens()
    parameters = list(furina.adapter_parameters(model).values())
    loss = task_loss(model, batch)
    with torch.no_grad():
        model(**batch)
    loss.backward()
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        found = task_loss(model, batch)
    assert torch.equal(found, task_loss(model, batch).detach())


@pytest.mark.parametrize("method", furina.methods())
def test_inside_evaluation_mode_each_linear_derives_once(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = adapted(method), []
    for layer in state_of(model).layers.values():
        derive = layer.derive
        monkeypatch.setattr(layer, "derive", lambda d=derive: made.append(1) or d())
    expected = logits(model)
    made.clear()
    with evaluation_mode(model):
        assert torch.equal(logits(model), expected)
        first = len(made)
        assert torch.equal(logits(model), expected)
        assert len(made) == first
    logits(model)
    assert len(made) > first


def test_generating_derives_once_and_the_next_time_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = adapted(), []
    layer = next(iter(state_of(model).layers.values()))
    derive = layer.derive
    monkeypatch.setattr(layer, "derive", lambda: made.append(1) or derive())
    ids = tokens(1)["input_ids"]
    for count in (1, 2):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
        assert len(made) == count


def test_training_or_loading_inside_evaluation_mode_forgets_what_was_kept() -> None:
    model = adapted()
    with evaluation_mode(model):
        before = logits(model)
        state = furina.adapter_state_dict(model)
        furina.load_adapter_state_dict(model, {name: 0.5 * t for name, t in state.items()})
        loaded = logits(model)
        task_loss(model, tokens()).backward()
        written_through_data(list(furina.adapter_parameters(model).values()))
        assert not torch.equal(logits(model), loaded) and not torch.equal(loaded, before)


@pytest.mark.parametrize("way", ["load_state_dict", "copy_", "data"])
def test_dora_follows_weights_that_are_loaded_after_adapting(way: str) -> None:
    model, x = chain(small("dora")).eval(), torch.randn(2, 3, 11, dtype=torch.float64)
    perturb(model)
    model(x)
    base = model.first.base
    other = torch.randn_like(base.weight)
    if way == "load_state_dict":
        base.load_state_dict({"weight": other, "bias": base.bias.detach().clone()})
    elif way == "copy_":
        with torch.no_grad():
            base.weight.copy_(other)
    else:
        base.weight.data.mul_(3.0)
    with torch.no_grad():
        found = model(x)
        furina.merge(model)
        torch.testing.assert_close(model(x), found, rtol=1e-12, atol=1e-12)


def test_a_state_dict_carries_all_that_dora_computes_with() -> None:
    one, other = (chain(small("dora"), seed=seed).eval() for seed in (0, 1))
    perturb(one)
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    one(x), other(x)
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), one(x))


def in_place(seed: int = 0) -> nn.Module:
    model = chain(small("pissa", in_place=True), seed=seed).eval()
    perturb(model)
    return model


def test_pissa_in_place_takes_another_adapter_of_its_backbone_by_state_dict() -> None:
    one, other = in_place(), chain(small("pissa", in_place=True)).eval()
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(other(x), one(x))
        furina.merge(other)
        torch.testing.assert_close(other(x), one(x), rtol=1e-12, atol=1e-12)


def test_pissa_in_place_refuses_a_state_dict_of_another_backbone_unchanged() -> None:
    model = in_place()
    before = {name: tensor.clone() for name, tensor in model.first.state_dict().items()}
    with pytest.raises(ConfigurationError, match="first has another backbone's weight"):
        model.load_state_dict(in_place(seed=1).state_dict())
    base = model.first.base
    with pytest.raises(ConfigurationError, match="load weights into the backbone before"):
        base.load_state_dict({"weight": torch.randn_like(base.weight), "bias": base.bias.detach()})
    assert torch.equal(base.weight, before["base.weight"])


@pytest.mark.parametrize("act", [furina.merge, furina.remove])
def test_pissa_in_place_neither_merges_nor_removes_with_a_foreign_weight(act) -> None:
    model = in_place()
    with torch.no_grad():
        model.first.base.weight.mul_(2)
    with pytest.raises(ConfigurationError, match="another backbone's weight"):
        act(model)


def test_a_detached_in_place_adapter_follows_the_backbone_when_it_comes_back() -> None:
    model = in_place()
    adapters, x = furina.AdapterSet(model, "pissa"), torch.randn(2, 3, 11, dtype=torch.float64)
    adapters.use(None)
    with torch.no_grad():
        model.first.weight.mul_(2)
        weight = model.first.weight.clone()
        adapters.use("pissa")
        found = model(x)
        furina.merge(model)
        torch.testing.assert_close(model(x), found, rtol=1e-12, atol=1e-12)
        furina.remove(model)
    assert torch.equal(model.first.weight, weight)


def test_threads_do_not_read_one_anothers_routing() -> None:
    model, meet = adapted("mixlora"), threading.Barrier(2)
    batches = [tokens(2, 5, seed=seed) for seed in (1, 2)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
    up = model.model.layers[0].mlp.up_proj  # between the gate's decision and its use
    up.register_forward_pre_hook(lambda *_: (meet.wait(30), None)[1])
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = model(**batches[number]).logits

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in (0, 1))
