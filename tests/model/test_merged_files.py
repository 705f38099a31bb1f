"""What a merged model saves is the adapter that its weights hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import furina
from tests.helpers import tiny_llama
from tests.model.test_merged_models import adapted, every_method, logits, refused


@every_method
def test_an_adapter_merged_for_good_is_saved_as_before(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    expected = logits(model)
    furina.save(model, tmp_path / "before")
    furina.merge(model, keep_base=False)
    furina.save(model, tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    assert torch.equal(logits(furina.load(tiny_llama(), tmp_path / "after")), expected)


def test_a_head_trained_beside_stays_in_a_model_merged_for_good(tmp_path: Path) -> None:
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    model.lm_head.weight.data.mul_(2)
    furina.save(model, tmp_path / "a")
    model = furina.load(tiny_llama(), tmp_path / "a")
    head = model.lm_head.weight.detach().clone()
    furina.merge(model, keep_base=False)
    merged = logits(model)
    furina.save(model, tmp_path / "b")
    furina.adapt(model, "lora", seed=0)
    assert torch.equal(model.lm_head.weight, head)
    assert torch.equal(logits(model), merged)


def test_an_adapter_loads_into_a_model_merged_for_good(tmp_path: Path) -> None:
    model = adapted()
    furina.save(model, tmp_path / "a")
    furina.merge(model, keep_base=False)
    furina.load(model, tmp_path / "a", check_backbone=False)
    assert not furina.is_merged(model)


@every_method
def test_an_adapter_changed_while_merged_is_saved_only_after_unmerging(
    method: str, tmp_path: Path
) -> None:
    model = adapted(method)
    furina.merge(model)
    list(furina.adapter_parameters(model).values())[-1].data.mul_(2)
    refused(lambda: furina.save(model, tmp_path / "x"), "was changed after the merge")
    furina.unmerge(model)
    furina.save(model, tmp_path / "x")


@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_on_the_linear_itself_is_called(hook: str) -> None:
    model, called = adapted("lora").train(), []
    getattr(model.model.layers[0].mlp.up_proj.base, hook)(lambda *_: called.append(1))
    model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.sum().backward()
    assert called == [1]
