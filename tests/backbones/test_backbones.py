"""Backbones load by name, tiny ones are the same everywhere, and the hash sees every weight."""

from __future__ import annotations

import json
import socket

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import furina
from furina.assets import is_cached
from furina.backbones.load import backbone_hash, load_backbone, load_tokenizer, meta_backbone
from furina.backbones.tiny import TINY, tiny_tokenizer
from furina.errors import AssetError, ConfigurationError
from furina.kernels import processor
from furina.kernels.processor import Precision

MODEL = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def offline(monkeypatch):
    """Say so, and fail on any attempt to leave the machine."""

    def connect(*_):
        pytest.fail("tried to reach the network")

    monkeypatch.setenv("FURINA_OFFLINE", "1")
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_is_the_same_every_time_and_disturbs_no_generator(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load_backbone(name, "float32")
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert backbone_hash(load_backbone(name, "float32")) == backbone_hash(first)


@pytest.mark.parametrize(
    ("name", "digest"), [("tiny-llama", "ab07e4009c7a"), ("tiny-qwen2", "06d2c1e3042b")]
)
def test_a_tiny_model_is_the_same_on_every_processor(name, digest):
    assert backbone_hash(load_backbone(name, "float32")).startswith(digest)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_has_grouped_queries_and_no_square_mlp(name):
    model = load_backbone(name, "float32")
    layer = model.model.layers[0]
    assert layer.self_attn.k_proj.weight.shape == (32, 64)
    assert layer.mlp.up_proj.weight.shape == (160, 64)
    assert not model.training


def test_the_two_tiny_models_differ_in_what_a_method_must_handle():
    llama, qwen = (load_backbone(name, "float32") for name in TINY)
    assert llama.lm_head.weight is llama.model.embed_tokens.weight
    assert qwen.lm_head.weight is not qwen.model.embed_tokens.weight
    assert llama.model.layers[0].self_attn.q_proj.bias is None
    assert qwen.model.layers[0].self_attn.q_proj.bias.abs().min() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_tiny_model_has_the_same_weights_rounded_once_in_every_dtype(dtype):
    exact = load_backbone("tiny-qwen2", "float64")
    model = load_backbone("tiny-qwen2", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    for name, value in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.to(getattr(torch, dtype)))
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_model_reads_its_tokenizer_and_generates(name):
    model, tokenizer = load_backbone(name), load_tokenizer(name)
    assert len(tokenizer) <= model.config.vocab_size
    inputs = tokenizer(["the answer", "in"], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert output.shape[0] == 2


@pytest.mark.parametrize(
    "text", ["Question: the Answer in 1999?\n", "°C — 漢字 🙂", "  two  spaces "]
)
@pytest.mark.parametrize("name", TINY)
def test_the_tiny_tokenizer_keeps_every_text(name, text):
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) or not any(piece in text for piece in ("the", "in"))


def test_a_bos_is_there_only_when_the_tokenizer_adds_it():
    assert tiny_tokenizer(has_bos=False).bos_token_id is None
    assert 1 not in tiny_tokenizer().encode("the")
    assert tiny_tokenizer(adds_bos=True).encode("the")[0] == 1


def test_a_saved_tiny_backbone_loads_as_a_folder(tmp_path):
    model, tokenizer = load_backbone("tiny-llama", "float32"), load_tokenizer("tiny-llama")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path), "float32")
    assert backbone_hash(again) == backbone_hash(model)
    assert not again.training
    text = "Question: the end?"
    assert load_tokenizer(str(tmp_path)).encode(text) == tokenizer.encode(text)


def test_a_tokenizer_without_a_pad_token_gets_its_end_token(tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    load_backbone("tiny-llama").config.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token_id is None
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_the_hash_sees_one_changed_weight_and_the_dtype():
    model = load_backbone("tiny-llama", "float32")
    before = backbone_hash(model)
    assert backbone_hash(load_backbone("tiny-llama", "bfloat16")) != before
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5].add_(1e-6)
    assert backbone_hash(model) != before


def test_attention_implementation_is_passed_on():
    assert load_backbone("tiny-llama", attention="eager").config._attn_implementation == "eager"


def test_an_unknown_name_suggests_the_nearest(offline):
    with pytest.raises(
        ConfigurationError, match=f"'smollm2-135m' is no name .*Did you mean '{MODEL}'"
    ):
        load_backbone("smollm2-135m")
    with pytest.raises(ConfigurationError, match=r"'tiny-lama'.*Did you mean 'tiny-llama'"):
        load_tokenizer("tiny-lama")


def test_a_folder_without_a_model_is_one_sentence(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "missing"), "./missing"):
        with pytest.raises(ConfigurationError, match="is no model folder"):
            load_backbone(name)


def test_a_damaged_folder_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="Cannot load backbone"):
        load_backbone(str(tmp_path))
    load_backbone("tiny-llama").config.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="Cannot load backbone"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ConfigurationError, match="Cannot load backbone"):
        load_backbone(str(tmp_path))


def test_an_unknown_dtype_suggests_the_nearest():
    with pytest.raises(ConfigurationError, match=r"no dtype 'bfloat'. Did you mean 'bfloat16'"):
        load_backbone("tiny-llama", "bfloat")


def test_an_asset_that_is_not_cached_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("FURINA_CACHE_DIR", str(tmp_path))
    with pytest.raises(AssetError, match=f"{MODEL} is not cached in .* run `furina assets`"):
        load_backbone(MODEL)


@pytest.mark.assets
@pytest.mark.skipif(not is_cached(MODEL), reason=f"{MODEL} is not cached: run `furina assets`")
def test_the_real_model_continues_a_sentence(offline):
    model, tokenizer = load_backbone(MODEL), load_tokenizer(MODEL)
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])


def test_an_unknown_attention_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match=r"Cannot load backbone 'tiny-llama'.*nosuch"):
        load_backbone("tiny-llama", attention="nosuch")


@pytest.mark.parametrize("chosen", ["bfloat16", "float32"])
def test_auto_is_the_default_and_remembers_what_the_checkpoint_is_stored_in(
    chosen, tmp_path, monkeypatch
):
    monkeypatch.setattr(processor, "automatic", lambda kind: Precision(chosen, "a test"))
    load_backbone("tiny-llama", "float16").save_pretrained(tmp_path)
    model = load_backbone(str(tmp_path))
    assert model.dtype == getattr(torch, chosen)
    assert model.checkpoint_dtype == torch.float16
    assert load_backbone(str(tmp_path), "checkpoint").dtype == torch.float16
    assert not hasattr(load_backbone(str(tmp_path), "float32"), "checkpoint_dtype")
    assert load_backbone("tiny-llama").dtype == getattr(torch, chosen)


def test_a_checkpoint_that_does_not_say_its_dtype_is_asked_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "automatic", lambda kind: Precision("bfloat16", "a test"))
    load_backbone("tiny-llama", "float32").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_backbone(str(tmp_path))
    assert (model.dtype, model.checkpoint_dtype) == (torch.bfloat16, torch.float32)


def _drop(weights):
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"]


def _wrap(weights):
    for name in [name for name in weights if "q_proj" in name]:
        weights[name.replace("q_proj.", "q_proj.base.")] = weights.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop, "it lacks model.layers.0.mlp.up_proj.weight and 1 more; check its config.json"),
        (lambda w: w.update(extra=torch.ones(2)), "it holds extra, which such a model has not;"),
        (
            lambda w: w.update({"model.norm.weight": torch.ones(3)}),
            "it holds model.norm.weight in another shape;",
        ),
        (_wrap, "q_proj.bias and 3 more; it holds model.layers.0.self_attn.q_proj.base.bias and 3"),
        (_wrap, "an adapted model was saved there, which furina.export_merged does rightly."),
        (
            lambda w: w.pop("lm_head.weight"),
            "is no whole Qwen2ForCausalLM: it lacks lm_head.weight;",
        ),
    ],
)
def test_a_folder_without_all_and_only_the_models_weights_is_refused(tmp_path, change, words):
    load_backbone("tiny-qwen2", "float32").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for dtype in ("float32", "auto"):
        with pytest.raises(ConfigurationError) as caught:
            load_backbone(str(tmp_path), dtype)
        assert words in str(caught.value) and "\n" not in str(caught.value)


def _in_its_own_words(weights):
    """Store a tied head, frequencies and no prefix, as older checkpoints do."""
    for name in list(weights):
        weights[name.removeprefix("model.")] = weights.pop(name)
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["layers.0.self_attn.masked_bias"] = torch.tensor(-1e4)
    weights["rotary_emb.inv_freq"] = torch.ones(8)


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: None,
        lambda weights: weights.update(
            {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
        ),
        _in_its_own_words,
    ],
)
def test_a_tied_head_and_buffers_that_a_model_makes_itself_may_be_there_or_not(tmp_path, change):
    model = load_backbone("tiny-llama", "float32")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in weights
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert backbone_hash(load_backbone(str(tmp_path), "float32")) == backbone_hash(model)


@pytest.mark.parametrize("name", ["DeepseekV3", "GPT2", "GPTNeoX", "Mixtral", "Falcon", "OPT"])
def test_what_an_architecture_declares_to_be_of_no_use_is_not_missed(tmp_path, name):
    configuration = getattr(transformers, f"{name}Config")(
        **{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 24, "num_key_value_heads": 2, "ffn_dim": 24},
        **{"word_embed_proj_dim": 32, "moe_intermediate_size": 8, "n_routed_experts": 8},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "max_position_embeddings": 32},
    )
    AutoModelForCausalLM.from_config(configuration).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    ignored = {
        "DeepseekV3": "model.layers.61.eh_proj.weight",
        "GPT2": "transformer.h.0.attn.bias",
        "GPTNeoX": "gpt_neox.layers.0.attention.masked_bias",
    }
    if name in ignored:
        weights[ignored[name]] = torch.ones(1)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert type(load_backbone(str(tmp_path), "float32")).__name__.startswith(name)


def test_an_adapters_folder_is_called_one(tmp_path):
    adapter = furina.adapt(load_backbone("tiny-llama", "float32"), "lora")
    furina.save(adapter, tmp_path / "furina")
    furina.export_peft(adapter, tmp_path / "peft")
    load_backbone("tiny-llama", "float32").save_pretrained(tmp_path / "both")
    for file in (tmp_path / "peft").iterdir():
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    for folder, words in (
        ("furina", "is a furina adapter folder and no backbone: name the model"),
        ("peft", "holds a PEFT adapter and is no backbone: merge it"),
        ("both", "holds a PEFT adapter and is no backbone: merge it"),
    ):
        for load in (load_backbone, meta_backbone, load_tokenizer):
            with pytest.raises(ConfigurationError, match=words):
                load(str(tmp_path / folder))


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path, monkeypatch, no_network):
    monkeypatch.delenv("FURINA_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("./x", "../x", "/x", "~/x/y", "runs/x/adapter", "runs/", "runs\\x", "my model"):
        for load in (load_backbone, load_tokenizer):
            with pytest.raises(ConfigurationError, match=r"is not there|There is no folder"):
                load(name)


def test_a_name_that_may_be_the_hubs_or_a_folders_is_said_to_be_neither(offline, tmp_path):
    for name in ("runs/x", "some-model-of-mine"):
        with pytest.raises(ConfigurationError, match=rf"There is no folder {name} either\."):
            load_backbone(name)
        with pytest.raises(ConfigurationError, match=r"no such folder; its config\.json"):
            meta_backbone(name)
