"""Weights that were unfrozen and trained beside an adapter are saved, loaded and exported too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import furina
from furina.errors import AdapterFileError, ConfigurationError
from furina.model.config_file import TENSOR_FILE, read_adapter_config
from furina.model.router_removal import without_router
from furina.model.state import state_of
from tests.helpers import BACKBONES, fingerprint, perturb, raw, small, task_loss, tokens


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**tokens()).logits
    return found


def train(model: nn.Module, *names: str, method: str = "furina") -> nn.Module:
    """Adapt a model and train some of its own parameters a little beside the adapter."""
    furina.adapt(model, small(method), seed=0)
    perturb(model)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    task_loss(model, tokens()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def tied() -> nn.Module:
    return furina.load_backbone("tiny-llama", "float32")


CASES: list[tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = [
    (BACKBONES["llama"], ("lm_head.weight",), ("lm_head.weight",)),
    (
        BACKBONES["llama"],
        ("model.norm.weight", "model.embed_tokens.weight"),
        ("model.embed_tokens.weight", "model.norm.weight"),
    ),
    (
        BACKBONES["qwen2"],
        ("model.layers.0.self_attn.q_proj.base.bias",),
        ("model.layers.0.self_attn.q_proj.bias",),
    ),
    (tied, ("lm_head.weight",), ("model.embed_tokens.weight",)),
]


@pytest.mark.parametrize(("backbone", "names", "saved"), CASES)
@pytest.mark.parametrize("merged", [False, True])
def test_what_was_trained_beside_the_adapter_comes_back_with_it(
    backbone, names, saved, merged: bool, tmp_path: Path
) -> None:
    model = train(backbone(), *names)
    expected = logits(model)
    if merged:
        furina.merge(model)
    furina.save(model, tmp_path / "a")
    assert tuple(read_adapter_config(tmp_path / "a")["also_trained"]) == saved
    assert set(saved) <= set(load_file(tmp_path / "a" / TENSOR_FILE))
    twin = backbone()
    before = {name: raw(tensor) for name, tensor in twin.state_dict().items()}
    furina.load(twin, tmp_path / "a")
    assert torch.equal(logits(twin), expected)
    furina.remove(twin)
    assert {name: raw(tensor) for name, tensor in twin.state_dict().items()} == before


def test_a_loaded_head_stays_where_the_merge_gave_up_the_backbone(tmp_path: Path) -> None:
    furina.save(train(BACKBONES["llama"](), "lm_head.weight"), tmp_path / "a")
    twin = furina.load(BACKBONES["llama"](), tmp_path / "a")
    expected = logits(twin)
    furina.merge(twin, keep_base=False)
    for handle in state_of(twin).handles:
        handle.remove()
    torch.testing.assert_close(logits(twin), expected, rtol=1e-4, atol=1e-4)


def test_a_loaded_head_is_saved_again_even_if_it_was_frozen(tmp_path: Path) -> None:
    furina.save(train(BACKBONES["llama"](), "lm_head.weight"), tmp_path / "a")
    twin = furina.load(BACKBONES["llama"](), tmp_path / "a")
    assert twin.lm_head.weight.requires_grad
    twin.requires_grad_(False)
    furina.save(twin, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_trained_head_takes_the_place_of_any_head_and_of_nothing_else(tmp_path: Path) -> None:
    furina.save(train(BACKBONES["llama"](), "lm_head.weight"), tmp_path / "a")
    model = BACKBONES["llama"]()
    model.lm_head.weight.data.zero_()
    furina.load(model, tmp_path / "a")
    other = BACKBONES["llama"]()
    other.model.norm.weight.data.mul_(2)
    with pytest.raises(AdapterFileError, match=r"model\.norm\.weight has other entries"):
        furina.load(other, tmp_path / "a")


def test_new_rows_of_the_embeddings_come_back_into_a_model_of_that_size(tmp_path: Path) -> None:
    def resized() -> nn.Module:
        model = tied()
        model.resize_token_embeddings(400)
        return model

    model = train(resized(), "model.embed_tokens.weight")
    furina.save(model, tmp_path / "a")
    assert torch.equal(logits(furina.load(resized(), tmp_path / "a")), logits(model))
    plain = tied()
    before = fingerprint(plain)
    with pytest.raises(AdapterFileError) as caught:
        furina.load(plain, tmp_path / "a")
    for words in ("model.embed_tokens.weight of shape [400, 64]", "resize_token_embeddings"):
        assert words in str(caught.value)
    assert fingerprint(plain) == before


def test_a_trainable_weight_under_an_adapter_is_refused(tmp_path: Path) -> None:
    model = furina.adapt(BACKBONES["llama"](), small("lora"))
    model.model.layers[1].mlp.up_proj.base.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"layers\.1\.mlp\.up_proj has an adapter and a"):
        furina.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_adapter_set_has_no_place_for_a_trained_head(tmp_path: Path) -> None:
    furina.save(train(BACKBONES["llama"](), "lm_head.weight"), tmp_path / "a")
    model = BACKBONES["llama"]()
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match=r"trained together with lm_head\.weight"):
        furina.AdapterSet(model).load("a", tmp_path / "a")
    assert fingerprint(model) == before


def test_an_adapter_set_does_not_pass_a_trained_head_on(tmp_path: Path) -> None:
    furina.save(train(BACKBONES["llama"](), "lm_head.weight"), tmp_path / "a")
    for model in (
        train(BACKBONES["llama"](), "lm_head.weight"),
        furina.load(BACKBONES["llama"](), tmp_path / "a"),
    ):
        adapters, expected = furina.AdapterSet(model, "one"), logits(model)
        for call in (
            lambda adapters=adapters: adapters.add("two", "lora"),
            lambda adapters=adapters: adapters.use(None),
            lambda adapters=adapters: adapters.drop("one"),
        ):
            with pytest.raises(ConfigurationError, match=r"lm_head\.weight is trained beside"):
                call()
        assert adapters.names == ("one",) and torch.equal(logits(model), expected)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_trained_head_stays_when_the_router_is_removed(loaded: bool, tmp_path: Path) -> None:
    model = train(BACKBONES["llama"](), "lm_head.weight", method="mixlora")
    if loaded:
        furina.save(model, tmp_path / "a")
        model = furina.load(BACKBONES["llama"](), tmp_path / "a")
    head = model.lm_head.weight.detach().clone()
    without_router(model)
    assert torch.equal(model.lm_head.weight, head)
    furina.save(model, tmp_path / "b")
    twin = furina.load(BACKBONES["llama"](), tmp_path / "b")
    assert torch.equal(logits(twin), logits(model))


@pytest.mark.parametrize(("backbone", "names", "saved"), CASES)
def test_the_merged_folder_holds_what_was_trained_beside(
    backbone, names, saved, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = train(backbone(), *names)
    furina.export_merged(model, tmp_path / "x")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backbone", "names", "saved"), [CASES[0], CASES[1], CASES[3]])
def test_peft_gets_what_was_trained_beside_as_modules_to_save(
    backbone, names, saved, tmp_path: Path
) -> None:
    from peft import PeftModel

    model = train(backbone(), *names, method="lora")
    furina.export_peft(model, tmp_path / "x")
    written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[0] for name in saved} <= set(written["modules_to_save"])
    loaded = PeftModel.from_pretrained(backbone(), str(tmp_path / "x")).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    plain = PeftModel.from_pretrained(backbone(), str(tmp_path / "x")).eval().merge_and_unload()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


def test_peft_has_no_place_for_the_bias_of_an_adapted_linear(tmp_path: Path) -> None:
    model = train(BACKBONES["qwen2"](), *CASES[2][1], method="lora")
    with pytest.raises(ConfigurationError, match=r"q_proj\.bias was trained.*export the merged"):
        furina.export_peft(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())
    assert state_of(model).config.name == "lora"


def test_without_anything_beside_peft_saves_no_modules(tmp_path: Path) -> None:
    furina.export_peft(train(BACKBONES["llama"](), method="lora"), tmp_path / "x")
    written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert not written.get("modules_to_save")


def test_an_unfrozen_head_is_in_the_optimisers_groups() -> None:
    model = furina.adapt(BACKBONES["llama"](), small("furina"), seed=0)
    bare = furina.parameter_groups(model, 1e-3, weight_decay=0.1)
    head = model.get_output_embeddings().weight.requires_grad_()
    *groups, last = furina.parameter_groups(model, 1e-3, weight_decay=0.1)
    assert [group["names"] for group in groups] == [group["names"] for group in bare]
    assert len(last["params"]) == 1 and last["params"][0] is head
    assert (last["lr"], last["weight_decay"]) == (1e-3, 0.0)
