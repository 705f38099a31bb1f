"""A merged model is W + ΔW in every linear, or the call that needs it to be is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import furina
from furina.adapters import AdapterLinear
from furina.errors import ConfigurationError
from furina.model.state import state_of
from tests.helpers import MERGEABLE, chain, fingerprint, perturb, raw, small, tiny_llama, tokens

every_method = pytest.mark.parametrize("method", MERGEABLE)
kept_or_not = pytest.mark.parametrize("keep_base", [True, False])


def adapted(method: str = "furina", seed: int = 0):
    model = furina.adapt(tiny_llama(), small(method), seed=seed)
    perturb(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    batch = tokens()
    found: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


def refused(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def double(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return 2 * output


def narrow(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output[..., :-1]


@kept_or_not
@pytest.mark.parametrize("hook", [double, narrow])
def test_a_linear_whose_output_a_hook_changes_is_not_merged(hook, keep_base: bool) -> None:
    model = chain(small("furina"))
    perturb(model)
    model.second.base.register_forward_hook(hook)
    before = fingerprint(model)
    refused(lambda: furina.merge(model, keep_base), "second does not compute its merged weight")
    assert fingerprint(model) == before and not furina.is_merged(model)


def test_a_linear_whose_input_a_hook_changes_is_not_merged() -> None:
    model = chain(small("furina"))
    perturb(model)
    model.first.base.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    refused(lambda: furina.merge(model), "first does not compute its merged weight")


def test_a_linear_that_was_pruned_after_adapting_is_not_merged() -> None:
    model = chain(small("furina"))
    perturb(model)
    prune.l1_unstructured(model.first.base, "weight", 0.5)
    refused(lambda: furina.merge(model), "first does not compute its merged weight")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_hook_that_only_listens_lets_a_linear_merge(dtype: torch.dtype) -> None:
    model, heard = chain(small("furina"), dtype=dtype), []
    perturb(model)
    model.second.base.register_forward_hook(lambda *_: heard.append("after"))
    model.second.base.register_forward_pre_hook(lambda *_: heard.append("before"))
    assert furina.merge(model).num_merged == 2 and heard == ["before", "after"]


def test_a_backbone_made_in_inference_mode_is_merged_there_and_refused_elsewhere() -> None:
    with torch.inference_mode():
        model = adapted()
        expected = logits(model)
    before = fingerprint(model)
    refused(lambda: furina.merge(model), "made in torch.inference_mode.*merge in it too")
    assert fingerprint(model) == before and not furina.is_merged(model)
    with torch.inference_mode():
        furina.merge(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def shortened(model) -> None:
    model.model.layers = model.model.layers[:1]


def replaced(model) -> None:
    model.model.layers[1].mlp.up_proj = nn.Linear(24, 40, bias=False)


@pytest.mark.parametrize("change", [shortened, replaced])
@pytest.mark.parametrize("call", [furina.merge, furina.remove, furina.unmerge])
def test_a_linear_that_is_no_longer_in_the_model_is_named_and_nothing_changes(call, change) -> None:
    model = adapted()
    if call is furina.unmerge:
        furina.merge(model)
    change(model)
    before, merged = fingerprint(model), furina.is_merged(model)
    refused(partial(call, model), r"layers.1\..* was replaced or taken away")
    assert fingerprint(model) == before and furina.is_merged(model) == merged


def test_merging_draws_no_random_numbers() -> None:
    model = adapted()
    before = torch.get_rng_state()
    furina.merge(model)
    assert torch.equal(torch.get_rng_state(), before)


def interrupt(monkeypatch, method: str, at: int, error: BaseException, late: bool) -> None:
    """Let the `at`-th call of a layer's method fail, before or after it has done its work."""
    real, calls = getattr(AdapterLinear, method), []

    def failing(layer: AdapterLinear) -> None:
        calls.append(layer.name)
        if late or len(calls) != at:
            real(layer)
        if len(calls) == at:
            raise error

    monkeypatch.setattr(AdapterLinear, method, failing)


@kept_or_not
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
def test_an_interrupted_merge_changes_nothing(error, late, keep_base, monkeypatch) -> None:
    model = adapted()
    before, expected = fingerprint(model), logits(model)
    with monkeypatch.context() as patch:
        interrupt(patch, "merge", 5, error, late)
        with pytest.raises(type(error)):
            furina.merge(model, keep_base)
    assert fingerprint(model) == before and not furina.is_merged(model)
    refused(lambda: furina.unmerge(model), "not merged")
    furina.merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_a_merge_that_stops_within_a_weight_changes_nothing(monkeypatch) -> None:
    model = adapted()
    before = fingerprint(model)
    weight = state_of(model).layers["model.layers.1.mlp.up_proj"].base.weight

    stopped = []

    def half(self: Tensor, other: Tensor) -> Tensor:
        if self is not weight or stopped:
            return copy_(self, other)
        copy_(self[:3], other[:3])
        stopped.append(weight)
        raise KeyboardInterrupt

    copy_ = Tensor.copy_
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", half)
        with pytest.raises(KeyboardInterrupt):
            furina.merge(model)
    assert stopped and fingerprint(model) == before


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", [1, 5, 14])
def test_an_interrupted_unmerge_goes_on_with_the_next_call(at: int, late: bool, monkeypatch):
    model = adapted()
    before = fingerprint(model)
    furina.merge(model)
    with monkeypatch.context() as patch:
        interrupt(patch, "unmerge", at, KeyboardInterrupt(), late)
        with pytest.raises(KeyboardInterrupt):
            furina.unmerge(model)
    if at < 14 or not late:
        refused(lambda: furina.merge(model), "merged already")
        furina.unmerge(model)
    assert fingerprint(model) == before


@kept_or_not
def test_other_weights_are_not_loaded_into_a_merged_model(keep_base: bool) -> None:
    model, other = adapted(), tiny_llama(seed=1)
    furina.merge(model, keep_base)
    before = fingerprint(model)
    weights, outer = other.state_dict(), nn.ModuleDict({"inner": model})
    for load in (
        lambda: model.load_state_dict(weights),
        lambda: model.load_state_dict(weights, assign=True),
        lambda: model.model.load_state_dict(other.model.state_dict()),
        lambda: model.model.layers[1].mlp.up_proj.load_state_dict({"weight": torch.ones(40, 24)}),
        lambda: outer.load_state_dict({f"inner.{name}": w for name, w in weights.items()}),
    ):
        refused(load, "weight cannot be loaded into a merged model.*call furina.remove first")
        assert fingerprint(model) == before
    model.load_state_dict({"lm_head.weight": other.lm_head.weight}, strict=False)
    assert torch.equal(model.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("unmerged", [False, True])
def test_when_the_adapter_is_out_weights_are_loaded_as_ever(unmerged: bool) -> None:
    model, other = adapted(), tiny_llama(seed=1)
    furina.merge(model)
    if unmerged:
        furina.unmerge(model)
    furina.remove(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), logits(other))


def test_a_copy_of_a_merged_model_has_a_guard_of_its_own() -> None:
    model, other = adapted(), tiny_llama(seed=1)
    furina.merge(model)
    twin = copy.deepcopy(model)
    furina.remove(model)
    model.load_state_dict(other.state_dict())
    refused(lambda: twin.load_state_dict(other.state_dict()), "cannot be loaded into a merged")
    furina.remove(twin)
    twin.load_state_dict(other.state_dict())


@every_method
def test_another_adapter_is_not_loaded_into_a_merged_model(method: str) -> None:
    model, other = adapted(method), adapted(method, seed=1)
    state = {name: 2 * tensor for name, tensor in furina.adapter_state_dict(other).items()}
    furina.merge(model)
    before = {name: raw(tensor) for name, tensor in furina.adapter_state_dict(model).items()}
    refused(lambda: furina.load_adapter_state_dict(model, state), "merged.*call furina.unmerge")
    assert {n: raw(tensor) for n, tensor in furina.adapter_state_dict(model).items()} == before


def scaled(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        parameter.mul_(1.5)


def hidden(parameter: nn.Parameter) -> None:
    parameter.data.mul_(1.5)


def turned(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.flip(0)


@every_method
@pytest.mark.parametrize("change", [scaled, hidden, turned])
def test_an_adapter_that_changed_after_the_merge_is_not_exported(method, change, tmp_path) -> None:
    model = adapted(method)
    own = furina.adapter_parameters(model).items()
    parameter = [p for name, p in own if name.startswith("model.layers.1.mlp.up_proj.")][-1]
    furina.merge(model)
    change(parameter)
    words = "layers.1.mlp.up_proj was changed after the merge.*call furina.unmerge first"
    refused(lambda: furina.export_merged(model, tmp_path / "x"), words)
    refused(lambda: furina.export_peft(model, tmp_path / "x"), words)
    assert not list(tmp_path.iterdir())
    furina.unmerge(model)
    now = logits(model.eval())
    furina.merge(model)
    torch.testing.assert_close(logits(model), now, rtol=1e-3, atol=1e-3)
    furina.export_merged(model, tmp_path / "x")


def test_a_merged_weight_that_was_written_to_is_not_exported_and_unmerging_says_so(
    tmp_path: Path,
) -> None:
    model = adapted()
    before = fingerprint(model)
    furina.merge(model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] += 1
    words = "layers.1.mlp.up_proj was changed after the merge"
    refused(lambda: furina.export_merged(model, tmp_path / "x"), words)
    with pytest.warns(UserWarning, match=r"up_proj was changed after the merge.*change is lost"):
        furina.unmerge(model)
    assert fingerprint(model) == before


def test_a_model_of_which_a_part_was_wrapped_is_not_exported(tmp_path: Path) -> None:
    model = adapted()
    model.model.layers[1] = torch.compile(model.model.layers[1])
    refused(lambda: furina.export_merged(model, tmp_path / "x"), "layers.1 is wrapped by torch.com")
    assert not list(tmp_path.iterdir()) and not furina.is_merged(model)
    furina.export_peft(model, tmp_path / "lora")
    from safetensors.torch import load_file

    assert not any(
        "_orig_mod" in key for key in load_file(tmp_path / "lora/adapter_model.safetensors")
    )


@every_method
def test_a_model_merged_for_good_is_a_plain_one_that_is_adapted_anew(method: str) -> None:
    model = tiny_llama()
    model.lm_head.weight.requires_grad_(False)
    before = {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()}
    perturb(furina.adapt(model, small(method), seed=0))
    furina.merge(model, keep_base=False)
    merged, weights = logits(model), raw(model.model.layers[0].mlp.up_proj.weight)
    refused(lambda: furina.adapt(model, "lora", targets=["nope"]), "matches no module")
    assert furina.is_merged(model)
    furina.adapt(model, small("lora"), seed=0)
    assert not furina.is_merged(model) and furina.describe(model).method == "lora"
    assert torch.equal(logits(model), merged)
    perturb(model)
    furina.merge(model)
    furina.remove(model)
    assert torch.equal(logits(model), merged)
    assert raw(model.model.layers[0].mlp.up_proj.weight) == weights
    assert {name: (p.requires_grad, id(p)) for name, p in model.named_parameters()} == before
    assert not model._forward_pre_hooks and not model._load_state_dict_pre_hooks


@every_method
def test_a_model_merged_for_good_says_what_can_be_done_with_it(method: str, tmp_path) -> None:
    model = adapted(method)
    state = furina.adapter_state_dict(model)
    furina.merge(model, keep_base=False)
    before = fingerprint(model)
    for call in (
        lambda: furina.remove(model),
        lambda: furina.unmerge(model),
        lambda: furina.merge(model),
        lambda: furina.load_adapter_state_dict(model, state),
    ):
        refused(
            call, "keep_base=False, so W is gone: go on with.*adapts anew, or load the backbone"
        )
        assert fingerprint(model) == before
    furina.export_merged(model, tmp_path / "merged")
