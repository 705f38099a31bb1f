"""A merged model is the adapted one to within its dtype, and unmerging is exact to the bit.

Each equality is shown to have teeth: leaving out any single linear breaks its bound.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterLinear
from furina.errors import ConfigurationError
from furina.model.state import state_of
from tests.helpers import (
    BACKBONES,
    MERGEABLE,
    chain,
    fingerprint,
    perturb,
    raw,
    small,
    tokens,
    ulp_distance,
)

every_method = pytest.mark.parametrize("method", MERGEABLE)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
Model = nn.Module


def adapted(backbone: str, method: str, dtype: torch.dtype = torch.float32):
    model = furina.adapt(BACKBONES[backbone](dtype), small(method), seed=0)
    ratios = perturb(model)
    assert ratios and all(0.1 <= ratio <= 0.3 for ratio in ratios.values())
    return model


@torch.no_grad()
def logits(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of real tokens in float64."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    found: Tensor = model(**inputs).logits[batch["attention_mask"] != 0]
    return found.to(torch.float64)


def maximum(error: Tensor) -> float:
    return error.abs().max().item()


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


@dataclass
class Bound:
    """|merged − unmerged| against what the dtype itself costs the unmerged model."""

    measure: Callable[[Tensor], float]
    factor: float

    def ratio(self, merged: Tensor, unmerged: Tensor, exact: Tensor) -> float:
        """Return how much of the bound is used; above 1 it is broken."""
        return self.measure(merged - unmerged) / (self.factor * self.measure(unmerged - exact))


BOUNDS = {torch.float32: Bound(maximum, 4), torch.bfloat16: Bound(rms, 2)}
every_bound = pytest.mark.parametrize("dtype", BOUNDS)


def exact_logits(model: Model, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of the same weights and adapter, unmerged, in float64."""
    return logits(copy.deepcopy(model).double(), batch)


def exact_weights(model: Model) -> dict[str, Tensor]:
    """Return every linear's W + ΔW in float64."""
    layers = state_of(model).layers.items()
    return {name: layer.pristine_weight.double() + layer.delta() for name, layer in layers}


def assert_rounded_once(model: Model, exact: dict[str, Tensor]) -> None:
    """Assert that every stored weight is within rounding of `exact`, and W itself is not."""
    for name, layer in state_of(model).layers.items():
        assert ulp_distance(layer.base.weight.detach(), exact[name]).max() <= 0.5 + 1e-3, name
        own = layer.pristine_weight.to(exact[name].device)
        assert ulp_distance(own, exact[name]).max() > 1, name


@contextmanager
def left_unmerged(layer: AdapterLinear) -> Iterator[None]:
    """Put one linear's own weight back into a merged model."""
    merged = layer.base.weight.detach().clone()
    with torch.no_grad():
        layer.base.weight.copy_(layer.pristine_weight)
        yield
        layer.base.weight.copy_(merged)


def check(
    model: Model, batch: dict[str, Tensor], bound: Bound, leave_out: str = ""
) -> tuple[float, float]:
    """Return the used part of the bound, whole and at the least with one linear left out.

    Each linear with `leave_out` in its name is left out in turn.
    """
    unmerged, exact = logits(model, batch), exact_logits(model, batch)
    furina.merge(model)
    whole = bound.ratio(logits(model, batch), unmerged, exact)
    least = float("inf")
    for name, layer in state_of(model).layers.items():
        if leave_out not in name:
            continue
        with left_unmerged(layer):
            least = min(least, bound.ratio(logits(model, batch), unmerged, exact))
    assert bound.ratio(logits(model, batch), unmerged, exact) == whole
    return whole, least


@every_method
@every_backbone
@every_bound
def test_a_merged_model_stays_within_its_dtypes_own_error_and_no_linear_may_be_left_out(
    method: str, backbone: str, dtype: torch.dtype, record_property
) -> None:
    whole, least = check(adapted(backbone, method, dtype), tokens(6, 15), BOUNDS[dtype])
    record_property("used", whole)
    record_property("least_with_one_left_out", least)
    assert whole <= 1, f"{whole:.2f} of the bound"
    assert least > 1, f"a linear left unmerged uses only {least:.2f} of the bound"


@every_method
@every_backbone
def test_in_float64_merged_equals_unmerged_and_no_linear_may_be_left_out(method, backbone) -> None:
    model, heard = adapted(backbone, method, torch.float64), {}
    layers = state_of(model).layers
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, x, y, name=name: heard.update({name: (x[0], y)}))
    logits(model, tokens())
    furina.merge(model)
    for name, layer in layers.items():
        x, unmerged = heard[name]
        assert maximum(layer.base(x) - unmerged) < 1e-12 * maximum(unmerged), name
        with left_unmerged(layer):
            assert maximum(layer.base(x) - unmerged) > 1e-12 * maximum(unmerged), name


@every_method
@every_bound
def test_every_stored_weight_is_the_float64_one_rounded_once(method: str, dtype) -> None:
    model = adapted("qwen2", method, dtype)
    exact = exact_weights(model)
    assert furina.merge(model).num_merged == 14
    assert_rounded_once(model, exact)


@every_method
def test_the_report_says_how_far_the_weights_moved(method: str) -> None:
    model = adapted("llama", method)
    layers = state_of(model).layers.values()
    delta = torch.cat([layer.delta().flatten() for layer in layers])
    weight = torch.cat([layer.base.weight.detach().flatten() for layer in layers]).double()
    report = furina.merge(model)
    assert report.max_abs_delta == pytest.approx(delta.abs().max().item(), rel=1e-12)
    assert report.relative_delta == pytest.approx((delta.norm() / weight.norm()).item(), rel=1e-9)
    assert 0.1 <= report.relative_delta <= 0.3


@every_method
@every_backbone
@every_bound
def test_a_hundred_merges_and_unmerges_do_not_drift(method: str, backbone: str, dtype) -> None:
    model = adapted(backbone, method, dtype)
    before, weights = fingerprint(model), {}
    for cycle in range(100):
        furina.merge(model)
        merged = {n: raw(layer.base.weight) for n, layer in state_of(model).layers.items()}
        assert cycle == 0 or merged == weights
        weights = merged
        furina.unmerge(model)
    assert fingerprint(model) == before


@every_method
def test_a_merged_model_is_the_plain_one_class_for_class_and_key_for_key(method: str) -> None:
    plain, model = BACKBONES["qwen2"](), adapted("qwen2", method)
    furina.merge(model)
    graph = [[(n, type(m)) for n, m in one.named_modules()] for one in (plain, model)]
    assert graph[0] == graph[1]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert furina.is_adapted(model) and furina.is_merged(model)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain, tokens()), logits(model, tokens()))


@every_method
@pytest.mark.parametrize("history", ["merged", "merged and unmerged", "merged twice"])
def test_removing_after_merging_gives_back_the_very_same_model(method: str, history: str) -> None:
    model = BACKBONES["llama"](torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    before = fingerprint(model)
    furina.adapt(model, small(method), seed=0)
    perturb(model)
    furina.merge(model)
    if history != "merged":
        furina.unmerge(model)
    if history == "merged twice":
        furina.merge(model)
    furina.remove(model)
    assert fingerprint(model) == before


@every_method
def test_without_a_kept_copy_unmerging_is_an_error_that_changes_nothing(method: str) -> None:
    model = adapted("llama", method)
    expected = logits(model, tokens())
    furina.merge(model, keep_base=False)
    layers = state_of(model).layers.values()
    assert all(layer._pristine is None for layer in layers)
    before = fingerprint(model)
    for call in (furina.unmerge, furina.remove):
        with pytest.raises(ConfigurationError, match="keep_base=False, so W is gone"):
            call(model)
        assert fingerprint(model) == before
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=1e-3, atol=1e-3)


@every_method
def test_merging_twice_and_unmerging_twice_are_errors_that_change_nothing(method: str) -> None:
    model = adapted("llama", method)
    with pytest.raises(ConfigurationError, match="not merged"):
        furina.unmerge(model)
    furina.merge(model)
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match="merged already"):
        furina.merge(model)
    layer = next(iter(state_of(model).layers.values()))
    with pytest.raises(ConfigurationError, match="merged already"):
        layer.merge()
    assert fingerprint(model) == before
    furina.unmerge(model)
    with pytest.raises(ConfigurationError, match="not merged"):
        layer.unmerge()


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_before_anything_changes(method, value) -> None:
    model = adapted("llama", method)
    name, parameter = list(furina.adapter_parameters(model).items())[-1]
    with torch.no_grad():
        parameter.view(-1)[0] = value
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match="nothing was merged") as caught:
        furina.merge(model)
    assert name.rpartition(".")[0] in str(caught.value)
    assert fingerprint(model) == before and not furina.is_merged(model)


def test_a_weight_that_overflows_the_backbones_dtype_is_refused() -> None:
    model = chain(small("lora"), dtype=torch.float16)
    perturb(model)
    with torch.no_grad():
        state_of(model).layers["second"].lora_B.mul_(1e6)
    with pytest.raises(ConfigurationError, match=r"second.*overflows the backbone's dtype"):
        furina.merge(model)
    assert not state_of(model).layers["first"].merged


@every_method
@pytest.mark.parametrize("mode", [True, False])
def test_a_layer_takes_over_the_mode_that_the_model_got_while_merged(method, mode: bool) -> None:
    """Else dropout would stay on in an evaluation, or off in training, without a word."""
    model = adapted("llama", method).train(not mode)
    furina.merge(model)
    model.train(mode)
    furina.unmerge(model)
    assert {module.training for module in model.modules()} == {mode}


@every_method
def test_a_backbone_cast_while_merged_unmerges_to_its_own_weight(method: str) -> None:
    model = adapted("llama", method, torch.bfloat16)
    weights = {n: layer.base.weight.detach().clone() for n, layer in state_of(model).layers.items()}
    furina.merge(model)
    model.float()
    furina.unmerge(model)
    for name, layer in state_of(model).layers.items():
        assert torch.equal(layer.base.weight, weights[name].float())


@every_method
@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_is_merged_and_unmerged_on_its_own(method: str, merged: bool) -> None:
    model = adapted("llama", method)
    pristine = fingerprint(model)
    if merged:
        furina.merge(model)
    before = fingerprint(model)
    twin = copy.deepcopy(model)
    if not merged:
        furina.merge(twin)
    furina.unmerge(twin)
    furina.merge(twin)
    furina.remove(twin)
    assert fingerprint(model) == before
    if merged:
        furina.unmerge(model)
    assert fingerprint(model) == pristine


@every_method
def test_a_merged_model_generates_what_the_unmerged_one_does(method: str) -> None:
    model = adapted("llama", method, torch.float64)
    ids = tokens()["input_ids"][:1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    unmerged = model.generate(ids, **options)
    furina.merge(model)
    assert torch.equal(model.generate(ids, **options), unmerged)


def test_a_backbone_of_inference_mode_is_merged_there_alone() -> None:
    with torch.inference_mode():
        model = BACKBONES["llama"]()
    furina.adapt(model, "lora", seed=0)
    with pytest.raises(ConfigurationError, match=r"made in torch\.inference_mode"):
        furina.merge(model)
    assert not furina.is_merged(model)
    with torch.inference_mode():
        furina.merge(model)
    assert furina.is_merged(model)
