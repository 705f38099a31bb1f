"""An adapter is loaded into its own backbone, whatever its dtype, and into no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import furina
from furina.errors import AdapterFileError, ConfigurationError
from furina.model.config_file import CONFIG_FILE, TENSOR_FILE, read_adapter_config
from furina.model.fingerprint import backbone_entry, backbone_name, backbone_weights, published_name
from furina.model.state import state_of
from tests.helpers import BACKBONES, fingerprint, perturb, small

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def adapted(model: nn.Module | None = None) -> nn.Module:
    model = BACKBONES["llama"]() if model is None else model
    furina.adapt(model, small("furina"), targets=["q_proj", "v_proj"], seed=0)
    perturb(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    furina.save(adapted(), folder := tmp_path_factory.mktemp("saved") / "adapter")
    return folder


def refused(folder: Path, model: nn.Module, *words: str) -> None:
    before = fingerprint(model)
    with pytest.raises(AdapterFileError) as caught:
        furina.load(model, folder)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert fingerprint(model) == before


def rotated(weight: Tensor) -> Tensor:
    return weight.roll(1, 0)


def with_odd_columns_flipped(weight: Tensor) -> Tensor:
    return weight * (1 - 2 * (torch.arange(weight.shape[-1]) % 2))


CHANGES: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("model.embed_tokens.weight", rotated),
    ("model.layers.0.self_attn.q_proj.weight", with_odd_columns_flipped),
    ("model.layers.0.self_attn.o_proj.weight", rotated),
    ("model.layers.1.mlp.up_proj.weight", with_odd_columns_flipped),
    ("model.layers.1.input_layernorm.weight", lambda weight: 3 * weight),
    ("model.norm.weight", lambda weight: 1.02 * weight),
    ("lm_head.weight", rotated),
]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_a_model_with_one_other_weight_is_refused_and_the_weight_named(
    saved: Path, name: str, change
) -> None:
    model = BACKBONES["llama"]()
    weight = model.get_parameter(name)
    weight.data = change(weight.data)
    refused(saved, model, "other weights", f"{name} has other entries")


def test_one_entry_of_a_small_weight_is_enough(saved: Path) -> None:
    model = BACKBONES["llama"]()
    model.model.norm.weight.data[7] += 0.02
    refused(saved, model, "model.norm.weight has other entries")


def test_another_buffer_is_refused_and_named(tmp_path: Path) -> None:
    def model(value: float) -> nn.Module:
        model = BACKBONES["llama"]()
        model.register_buffer("correction", torch.full((3,), value))
        return model

    furina.save(adapted(model(1.0)), tmp_path / "a")
    refused(tmp_path / "a", model(2.0), "correction has other entries")
    refused(tmp_path / "a", BACKBONES["llama"](), "this model has no correction")


def test_another_vocabulary_is_refused_and_named(saved: Path, tmp_path: Path) -> None:
    wide = BACKBONES["llama"]()
    wide.resize_token_embeddings(50)
    refused(saved, wide, "model.embed_tokens.weight has shape [50, 24] and not [48, 24]")
    furina.save(adapted(wide), tmp_path / "wide")
    assert furina.is_adapted(furina.load(furina.remove(wide), tmp_path / "wide"))
    refused(tmp_path / "wide", BACKBONES["llama"](), "[48, 24] and not [50, 24]")


def test_a_head_of_its_own_is_refused_where_the_backbone_ties_it(tmp_path: Path) -> None:
    furina.save(adapted(furina.load_backbone("tiny-llama", "float32")), tmp_path / "tied")
    untied = furina.load_backbone("tiny-llama", "float32")
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    refused(tmp_path / "tied", untied, "lm_head.weight is not among its weights")


@pytest.mark.parametrize("stored", DTYPES[:3])
@pytest.mark.parametrize("trained", DTYPES)
def test_the_same_backbone_is_recognised_in_every_dtype(stored, trained, tmp_path: Path) -> None:
    def checkpoint() -> nn.Module:
        return BACKBONES["llama"](torch.float32).to(stored)

    furina.save(adapted(checkpoint().to(trained)), tmp_path / "a")
    for dtype in DTYPES:
        assert furina.is_adapted(furina.load(checkpoint().to(dtype), tmp_path / "a"))


def test_a_model_without_values_is_refused_in_one_sentence(saved: Path, tmp_path: Path) -> None:
    model = furina.adapt(BACKBONES["llama"]().to("meta"), small("furina"))
    with pytest.raises(ConfigurationError, match="is on the meta device, without its values"):
        furina.save(model, tmp_path / "a")
    bare = BACKBONES["llama"]().to("meta")
    with pytest.raises(AdapterFileError, match=r"meta device.* check_backbone=False"):
        furina.load(bare, saved)
    assert furina.is_adapted(furina.load(bare, saved, check_backbone=False))


FIRST_FINGERPRINT = "400bc0278cb65e4433d46f9c0b35cfc70cbd5d924ffd88f1d4a0aead5418ce4a"
"""Of `BACKBONES["llama"]()` with all seven linears adapted, as version 1 computed it."""


def test_a_folder_of_version_1_is_loaded_and_checked_as_it_was(tmp_path: Path) -> None:
    model = furina.adapt(BACKBONES["llama"](), small("furina"), seed=0)
    furina.save(model, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for key in ("also_trained", "tensors_sha256", "sha256"):
        config.pop(key)
    backbone = {"model_type": "llama", "name": "", "dtype": "float32"}
    config |= {"version": 1, "backbone": backbone | {"fingerprint": FIRST_FINGERPRINT}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    save_file(load_file(tmp_path / TENSOR_FILE), tmp_path / TENSOR_FILE, {"format": "pt"})
    twin = furina.load(BACKBONES["llama"](), tmp_path)
    one, other = (furina.adapter_state_dict(m) for m in (model, twin))
    assert all(torch.equal(one[name], other[name]) for name in one)
    refused(tmp_path, BACKBONES["llama"](seed=1), "other weights", "an adapted linear")
    assert read_adapter_config(tmp_path)["also_trained"] == []


def test_where_the_samples_lie_never_changes() -> None:
    """Else no adapter saved before would be recognised."""
    model = nn.Module()
    model.q_proj = nn.Linear(100, 1000, dtype=torch.float64)
    with torch.no_grad():
        model.q_proj.weight.copy_(torch.arange(100_000.0).view(1000, 100) ** 0.5)
    furina.adapt(model, small("lora"), targets=["q_proj"])
    shape, entries = backbone_entry(model).weights["q_proj.weight"]
    assert shape == [1000, 100]
    assert entries.startswith("5UC1QfdBD0IrQjtC") and len(entries) == 684


def test_every_weight_is_sampled_under_its_plain_name_once_and_small_ones_whole() -> None:
    plain = backbone_weights(BACKBONES["qwen2"]())
    names = [name for name, _ in BACKBONES["qwen2"]().named_parameters()]
    model = furina.adapt(BACKBONES["qwen2"](), small("furina"), seed=0)
    perturb(model)
    unmerged = backbone_entry(model)
    furina.merge(model)
    assert backbone_entry(model) == unmerged
    assert (
        list(unmerged.weights) == names == [n for n, _ in BACKBONES["qwen2"]().named_parameters()]
    )
    for name, (shape, entries) in unmerged.weights.items():
        assert shape == list(plain[name].shape)
        assert len(entries) == -(-2 * min(256, plain[name].numel()) // 3) * 4


def test_what_was_said_before_the_backbone_was_given_up_is_saved(tmp_path: Path) -> None:
    model = adapted()
    furina.save(model, tmp_path / "a")
    state_of(model).backbone = backbone_entry(model)
    furina.merge(model, keep_base=False)
    furina.save(model, tmp_path / "b")
    for file in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen2"])
def test_the_folder_names_the_backbone_and_its_dtypes(name: str, tmp_path: Path) -> None:
    model = adapted(furina.load_backbone(name, "float32"))
    furina.save(model, tmp_path / "a")
    backbone = read_adapter_config(tmp_path / "a")["backbone"]
    assert (backbone["name"], backbone["dtype"]) == (name, "float32")
    assert backbone["checkpoint_dtype"] is None
    furina.load(furina.load_backbone(backbone["name"], backbone["dtype"]), tmp_path / "a")


def test_a_backbone_in_a_folder_is_named_by_its_whole_path(tmp_path: Path, monkeypatch) -> None:
    furina.load_backbone("tiny-llama", "bfloat16").save_pretrained(tmp_path / "backbone")
    monkeypatch.chdir(tmp_path)
    model = adapted(furina.load_backbone("./backbone"))
    monkeypatch.chdir("/")
    furina.save(model, tmp_path / "a")
    backbone = read_adapter_config(tmp_path / "a")["backbone"]
    assert backbone["name"] == str(tmp_path / "backbone")
    assert backbone["checkpoint_dtype"] == "bfloat16"


def test_a_model_of_the_hubs_cache_is_named_as_on_the_hub() -> None:
    model = BACKBONES["llama"]()
    cached = "/home/me/.cache/huggingface/hub/models--meta-llama--Llama-2-7b/snapshots/0a1b"
    for origin, name in (
        (cached, "meta-llama/Llama-2-7b"),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b"),
        ("snapshots/x", "snapshots/x"),
        ("", ""),
    ):
        model.config._name_or_path = origin
        assert (published_name(model), backbone_name(model)) == (name, name)
