"""The paper's backbones are known by their shape alone, with the parameters that were published."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import furina
from furina.adapters import methods
from furina.assets import is_cached, locate
from furina.backbones.architectures import ARCHITECTURES
from furina.backbones.load import load_backbone, meta_backbone
from furina.backbones.tiny import TINY
from furina.errors import ConfigurationError
from furina.model.inject import DEFAULT_TARGETS
from furina.model.parameters import describe
from furina.model.state import state_of

PUBLISHED = {
    "Qwen/Qwen2-7B": 7_615_616_512,
    "openchat/openchat-3.6-8b-20240522": 8_030_261_248,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "smollm2-135m-instruct": 134_515_008,
}
PAPER = [name for name in PUBLISHED if "/" in name]
pytestmark = pytest.mark.usefixtures("no_network")
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    return {name: meta_backbone(name) for name in PAPER}


def public(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(ARCHITECTURES[name].read_text())
    return content


def total(config: dict[str, Any]) -> int:
    """Return the parameters that follow from a config.json, independently of any model class."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    queries = config["num_attention_heads"] * width
    keys = config["num_key_value_heads"] * width
    biases = queries + 2 * keys if config["model_type"] == "qwen2" else 0
    attention = 2 * hidden * queries + 2 * hidden * keys + biases
    layer = attention + 3 * hidden * ffn + 2 * hidden
    embeddings = (1 if config["tie_word_embeddings"] else 2) * config["vocab_size"] * hidden
    return int(config["num_hidden_layers"] * layer + embeddings + hidden)


@every_architecture
def test_the_parameters_are_the_published_ones(name: str) -> None:
    model = meta_backbone(name)
    assert sum(p.numel() for p in model.parameters()) == total(public(name)) == PUBLISHED[name]
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(buffer.is_meta for buffer in model.buffers())
    assert not model.training


@every_architecture
def test_transformers_reads_every_value_of_the_file(name: str) -> None:
    read, public_values = meta_backbone(name).config, public(name)
    renamed = ("rope_scaling", "rope_theta", "torch_dtype", "sliding_window")
    for field, value in public_values.items():
        if field not in renamed:
            assert getattr(read, field) == value, field
    assert read.rope_parameters["rope_theta"] == public_values["rope_theta"]
    scaling = public_values.get("rope_scaling") or {"rope_type": "default"}
    assert {key: read.rope_parameters[key] for key in scaling} == scaling
    assert getattr(read, "sliding_window", None) is None  # Qwen2's is switched off in its file


def test_embeddings_are_tied_where_the_file_says_so(paper: dict[str, Any]) -> None:
    tied = [n for n, m in paper.items() if m.lm_head.weight is m.model.embed_tokens.weight]
    assert tied == ["meta-llama/Llama-3.2-3B"]


def test_every_architecture_has_its_sources() -> None:
    folder = next(iter(ARCHITECTURES.values())).parent
    readme = (folder / "README.md").read_text()
    for name, file in ARCHITECTURES.items():
        (line,) = (line for line in readme.splitlines() if f"`{file.name}`" in line)
        assert name in line and f"{PUBLISHED[name]:,}" in line and "huggingface.co/" in line
    assert sorted(folder.glob("*.json")) == sorted(ARCHITECTURES.values())


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_backbone_has_the_shape_that_is_loaded(name: str) -> None:
    shapes = {n: p.shape for n, p in meta_backbone(name).named_parameters()}
    assert shapes == {n: p.shape for n, p in load_backbone(name).named_parameters()}


def test_a_local_folder_needs_its_config_alone(tmp_path: Path) -> None:
    shutil.copy(ARCHITECTURES["meta-llama/Llama-3.2-3B"], tmp_path / "config.json")
    model = meta_backbone(str(tmp_path), "float32")
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED["meta-llama/Llama-3.2-3B"]
    assert {parameter.dtype for parameter in model.parameters()} == {model.dtype}


def test_the_hubs_cache_is_read_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--someone--Some-Llama" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shutil.copy(ARCHITECTURES["smollm2-135m-instruct"], snapshot / "config.json")
    reference = tmp_path / "models--someone--Some-Llama" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert meta_backbone("someone/Some-Llama").config.hidden_size == 576


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Qwen/Qwen2-7b", "not at hand, and the hub is not asked.*Did you mean 'Qwen/Qwen2-7B'"),
        ("meta-llama/Llama-3.2-1B", "Did you mean 'meta-llama/Llama-3.2-3B'"),
        ("someone/something", "Known: Qwen/Qwen2-7B"),
        ("not a name", "not at hand"),
        ("./nowhere", "is no model folder"),
    ],
)
def test_a_name_without_a_shape_is_one_sentence(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        meta_backbone(name)
    assert "\n" not in str(caught.value)


def test_a_damaged_config_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="Cannot load backbone"):
        meta_backbone(str(tmp_path))
    with pytest.raises(ConfigurationError, match="no dtype 'bfloat'"):
        meta_backbone("tiny-llama", "bfloat")


@pytest.mark.parametrize("method", methods())
def test_every_method_adapts_every_backbone_without_its_weights(
    method: str, paper: dict[str, nn.Module]
) -> None:
    for name, model in paper.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            furina.adapt(model, method, seed=0)
        try:
            state, summary = state_of(model), describe(model)
            layers = public(name)["num_hidden_layers"]
            leaves = [linear.rpartition(".")[2] for linear in state.layers]
            assert {leaf: leaves.count(leaf) for leaf in leaves} == dict.fromkeys(
                DEFAULT_TARGETS, layers
            )
            counts = [
                state.config.count(layer.base.in_features, layer.base.out_features, linear)
                for linear, layer in state.layers.items()
            ]
            assert summary.trainable == sum(count.trainable for count in counts)
            assert summary.trainable - summary.trainable_without_router == sum(
                count.router for count in counts
            )
            assert summary.total == summary.trainable + PUBLISHED[name]
        finally:
            furina.remove(model)


def test_options_that_look_at_the_weights_need_none_either(paper: dict[str, nn.Module]) -> None:
    model = paper["meta-llama/Llama-3.2-3B"]
    for method, options in (
        ("pissa", {"in_place": True}),
        ("pissa", {"svd_iterations": 2}),
        ("furina", {"start": "subtract"}),
    ):
        furina.adapt(model, method, seed=0, **options)
        assert all(parameter.is_meta for parameter in model.parameters())
        furina.remove(model)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED["meta-llama/Llama-3.2-3B"]


def test_furina_has_the_parameters_of_lora_and_one_more_for_each_output(
    paper: dict[str, nn.Module],
) -> None:
    for model in paper.values():
        furina.adapt(model, "lora", rank=128)
        lora = describe(model).trainable
        outputs = sum(layer.base.out_features for layer in state_of(model).layers.values())
        furina.remove(model)
        furina.adapt(model, "furina", rank=16, num_experts=8)
        assert describe(model).trainable == lora + outputs
        furina.remove(model)


@pytest.mark.assets
@pytest.mark.skipif(not is_cached("smollm2-135m-instruct"), reason="the model is not cached")
def test_the_fetched_model_has_the_shape_of_its_public_config() -> None:
    fetched = meta_backbone(str(locate("smollm2-135m-instruct")))
    known = meta_backbone("smollm2-135m-instruct")
    assert [(n, p.shape) for n, p in fetched.named_parameters()] == [
        (n, p.shape) for n, p in known.named_parameters()
    ]
    assert fetched.config.rope_parameters == known.config.rope_parameters
