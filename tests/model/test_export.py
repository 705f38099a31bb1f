"""What leaves furina is a plain model, or one LoRA, with the adapted model's outputs."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import furina
from furina import storage
from furina.errors import ConfigurationError, FurinaError, NotMergeableError
from furina.kernels import processor
from furina.kernels.processor import Precision
from furina.model import export
from furina.model.state import state_of
from tests.helpers import (
    BACKBONES,
    MERGEABLE,
    fingerprint,
    perturb,
    raw,
    small,
    tokens,
    ulp_distance,
)
from tests.model.test_merging import (
    BOUNDS,
    Bound,
    adapted,
    every_bound,
    exact_logits,
    exact_weights,
    logits,
)

every_method = pytest.mark.parametrize("method", MERGEABLE)
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def in_peft(folder: Path, base: torch.nn.Module) -> torch.nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(folder)).eval()


def lora_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return peft's adapted linears."""
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "r")]


def ratios_left_out(
    model: torch.nn.Module,
    batch: dict[str, Tensor],
    bound: Bound,
    unmerged: Tensor,
    exact: Tensor,
) -> list[float]:
    """Return the used part of the bound with each of peft's linears left out in turn."""
    ratios = []
    for module in lora_modules(model):
        assert module.scaling["default"] == 1.0
        module.scaling["default"] = 0.0
        ratios.append(bound.ratio(logits(model, batch), unmerged, exact))
        module.scaling["default"] = 1.0
    return ratios


@every_method
@every_backbone
@every_bound
def test_peft_gives_the_adapted_models_logits_and_no_linear_may_be_left_out(
    method: str, backbone: str, dtype: torch.dtype, tmp_path: Path, record_property
) -> None:
    model, batch, bound = adapted(backbone, method, dtype), tokens(6, 15), BOUNDS[dtype]
    before = fingerprint(model)
    rank = furina.export_peft(model, tmp_path / "peft")
    assert fingerprint(model) == before
    unmerged, exact = logits(model, batch), exact_logits(model, batch)
    loaded = in_peft(tmp_path / "peft", BACKBONES[backbone](dtype))
    used = bound.ratio(logits(loaded, batch), unmerged, exact)
    record_property("used", used)
    assert used <= 1, f"{used:.2f} of the bound"
    assert {module.r["default"] for module in lora_modules(loaded)} == {rank}
    ratios = ratios_left_out(loaded, batch, bound, unmerged, exact)
    assert len(ratios) == len(state_of(model).layers)
    assert min(ratios) > 1, f"without one linear only {min(ratios):.2f} of the bound is used"


@pytest.mark.parametrize(
    ("method", "options"), [("mola", {"allocation": (2, 3)}), ("mixlora", {}), ("slim", {})]
)
def test_linears_of_several_ranks_share_one_rank_and_one_alpha(method, options, tmp_path) -> None:
    """So says every reader: some know no rank of a single linear, and would scale it by another."""
    config = small(method, router_removed=True, **options)
    model = furina.adapt(BACKBONES["llama"](), config, seed=0)
    perturb(model)
    furina.export_peft(model, tmp_path / "peft")
    loaded = in_peft(tmp_path / "peft", BACKBONES["llama"]())
    largest = max(len(layer.lora_A) for layer in state_of(model).layers.values())
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == largest
    assert not written["rank_pattern"] and not written["alpha_pattern"]
    assert {module.r["default"] for module in lora_modules(loaded)} == {largest}
    batch = tokens(6, 15)
    bound = BOUNDS[torch.float32]
    unmerged, exact = logits(model, batch), exact_logits(model, batch)
    assert bound.ratio(logits(loaded, batch), unmerged, exact) <= 1


@every_method
def test_peft_merged_gives_the_same_weights_as_ours(method: str, tmp_path: Path) -> None:
    model = adapted("qwen2", method, torch.float32)
    furina.export_peft(model, tmp_path / "peft")
    theirs = in_peft(tmp_path / "peft", BACKBONES["qwen2"]()).merge_and_unload()
    furina.merge(model)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], weight, rtol=1e-5, atol=2e-6)


def test_furina_is_one_lora_of_rank_n_times_r(tmp_path: Path) -> None:
    model = adapted("llama", "furina")
    config = state_of(model).config
    assert furina.export_peft(model, tmp_path / "x") == config.num_experts * config.rank
    written = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == config.num_experts * config.rank
    assert written["peft_type"] == "LORA" and written["bias"] == "none"
    assert not written["use_dora"] and not written["use_rslora"]
    assert written["target_modules"] == sorted(furina.model.targets.DEFAULT_TARGETS)
    tensors = load_file(tmp_path / "x" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 14
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_subtracted_start_is_one_lora_too(tmp_path: Path) -> None:
    model = furina.adapt(BACKBONES["llama"](), small("furina", start="subtract"), seed=0)
    with torch.no_grad():
        for parameter in furina.adapter_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    assert furina.export_peft(model, tmp_path / "x") == (8 + 7) * 3
    loaded = in_peft(tmp_path / "x", BACKBONES["llama"]())
    torch.testing.assert_close(
        logits(loaded, tokens()), logits(model, tokens()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "targets", [["model.layers.1.self_attn.q_proj"], ["model.layers.0.*_proj"], ["up_proj"]]
)
def test_a_part_of_the_linears_is_a_part_in_peft_too(targets: list[str], tmp_path: Path) -> None:
    model = furina.adapt(BACKBONES["llama"](), small("lora"), targets=targets, seed=0)
    with torch.no_grad():
        for layer in state_of(model).layers.values():
            layer.lora_B.normal_(std=0.1)
    furina.export_peft(model, tmp_path / "x")
    loaded = in_peft(tmp_path / "x", BACKBONES["llama"]())
    found = {n for n, m in loaded.named_modules() if hasattr(m, "lora_A") and hasattr(m, "r")}
    assert found == {f"base_model.model.{name}" for name in state_of(model).layers}
    torch.testing.assert_close(
        logits(loaded, tokens()), logits(model, tokens()), rtol=1e-4, atol=1e-5
    )


@every_method
def test_a_merged_model_exports_the_same_lora(method: str, tmp_path: Path) -> None:
    model = adapted("llama", method)
    furina.export_peft(model, tmp_path / "a")
    furina.merge(model)
    furina.export_peft(model, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@every_method
@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_folder_is_the_merged_model_bit_for_bit(
    method, backbone, dtype, tmp_path
) -> None:
    from transformers import AutoModelForCausalLM

    model = adapted(backbone, method, dtype)
    exact = exact_weights(model)
    before = fingerprint(model)
    furina.export_merged(model, tmp_path / "x")
    assert fingerprint(model) == before, "exporting must leave the model unmerged, as it was"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype="auto").eval()
    assert loaded.dtype == dtype
    for name, weight in exact.items():
        stored = loaded.get_submodule(name).weight.detach()
        assert ulp_distance(stored, weight).max() <= 0.5 + 1e-3
    furina.merge(model)
    assert type(loaded) is type(model)
    assert {n: raw(t) for n, t in loaded.state_dict().items()} == {
        n: raw(t) for n, t in model.state_dict().items()
    }
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))
    merged = fingerprint(model)
    furina.export_merged(model, tmp_path / "y")
    assert fingerprint(model) == merged
    name = "model.safetensors"
    assert (tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes()


def test_the_merged_folder_loads_where_furina_cannot_be_imported(tmp_path: Path) -> None:
    furina.export_merged(adapted("llama", "furina"), tmp_path / "x")
    script = """
        import sys
        sys.modules["furina"] = None  # any import of it fails
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        print(type(model).__name__)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LlamaForCausalLM"


def test_the_tokenizer_goes_along(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = furina.load_tokenizer("tiny-llama")
    furina.export_merged(adapted("llama", "lora"), tmp_path / "x", tokenizer)
    text = "Question: größer?"
    assert AutoTokenizer.from_pretrained(tmp_path / "x").encode(text) == tokenizer.encode(text)


@every_method
def test_an_adapter_that_is_not_finite_is_not_exported(method: str, tmp_path: Path) -> None:
    model = adapted("llama", method)
    with torch.no_grad():
        next(iter(furina.adapter_parameters(model).values())).view(-1)[0] = torch.nan
    before = fingerprint(model)
    for call in (furina.export_merged, furina.export_peft):
        with pytest.raises(ConfigurationError, match="NaN"):
            call(model, tmp_path / "x")
    assert fingerprint(model) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["merged", "peft"])
def test_a_full_disk_is_one_sentence_leaves_nothing_and_unmerges(
    what, tmp_path, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = adapted("llama", "furina")
    before = fingerprint(model)
    monkeypatch.setattr(storage.os, "fsync", full)
    call = furina.export_merged if what == "merged" else furina.export_peft
    with pytest.raises(FurinaError, match="the disk is full"):
        call(model, tmp_path / "x")
    assert fingerprint(model) == before
    assert not list(tmp_path.iterdir())


def test_an_update_that_is_no_low_rank_product_has_no_lora(tmp_path: Path, monkeypatch) -> None:
    model = adapted("llama", "lora")
    monkeypatch.setattr(
        type(next(iter(state_of(model).layers.values()))), "factors", lambda _: None
    )
    with pytest.raises(NotMergeableError, match="not low-rank"):
        export.export_peft(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_the_backbones_own_folder_is_not_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "backbone"
    BACKBONES["llama"](torch.float32).save_pretrained(str(folder))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = furina.load_backbone(str(folder), "float32")
    furina.adapt(model, "lora", rank=2)
    with pytest.raises(ConfigurationError, match="holds the backbone itself"):
        furina.export_merged(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.fixture
def wide_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """Return a checkpoint stored in bfloat16 that "auto" has loaded in float32, with an adapter."""
    furina.load_backbone("tiny-llama", "bfloat16").save_pretrained(tmp_path / "stored")
    monkeypatch.setattr(processor, "automatic", lambda kind: Precision("float32", "a test"))
    model = furina.adapt(furina.load_backbone(str(tmp_path / "stored")), small("furina"))
    perturb(model)
    return model


@pytest.mark.parametrize("merged_before", [False, True])
def test_a_merged_folder_keeps_the_checkpoints_own_dtype_and_is_rounded_once(
    wide_model: torch.nn.Module, tmp_path: Path, merged_before: bool
) -> None:
    layers = state_of(wide_model).layers
    exact = {n: layer.pristine_weight.double() + layer.delta() for n, layer in layers.items()}
    plain = {name: tensor.clone() for name, tensor in wide_model.state_dict().items()}
    if merged_before:
        furina.merge(wide_model)
    furina.export_merged(wide_model, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in exact.items():
        assert raw(written.pop(f"{name}.weight")) == raw(weight.to(torch.bfloat16)), name
    for name, tensor in written.items():  # those of no adapted linear, tied ones once
        assert raw(tensor) == raw(plain[name].to(torch.bfloat16)), name
    assert "lm_head.weight" not in written
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    again = furina.load_backbone(str(tmp_path / "merged"), "checkpoint")
    assert again.dtype == torch.bfloat16
    assert wide_model.dtype == torch.float32 and furina.is_merged(wide_model) == merged_before


def test_a_dtype_that_is_asked_for_is_written(wide_model: torch.nn.Module, tmp_path: Path) -> None:
    furina.export_merged(wide_model, tmp_path / "float16", dtype=torch.float16)
    assert furina.load_backbone(str(tmp_path / "float16"), "checkpoint").dtype == torch.float16
    named = furina.load_backbone(str(tmp_path / "stored"), "float32")
    furina.export_merged(furina.adapt(named, small("lora")), tmp_path / "named")
    assert furina.load_backbone(str(tmp_path / "named"), "checkpoint").dtype == torch.float32


def test_what_a_model_keeps_in_fp32_is_written_in_it(
    wide_model: torch.nn.Module, tmp_path: Path
) -> None:
    wide_model._keep_in_fp32_modules_strict = {"norm"}
    furina.export_merged(wide_model, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    dtypes = {"norm" in name: tensor.dtype for name, tensor in written.items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_a_weight_that_overflows_the_written_dtype_is_one_sentence(
    wide_model: torch.nn.Module, tmp_path: Path
) -> None:
    with torch.no_grad():
        wide_model.model.norm.weight.fill_(1e6)
    with pytest.raises(ConfigurationError, match=r"model\.norm\.weight .* overflow torch.float16"):
        furina.export_merged(wide_model, tmp_path / "merged", dtype=torch.float16)
    assert not (tmp_path / "merged").exists() and not furina.is_merged(wide_model)


def test_peft_is_told_the_backbones_name_on_the_hub_and_else_its_folder(tmp_path: Path) -> None:
    model = adapted("llama", "lora")
    cached = tmp_path / "hub" / "models--org--name" / "snapshots" / "0a1b"
    cached.mkdir(parents=True)
    for number, (origin, name) in enumerate(((cached, "org/name"), ("org/name", "org/name"))):
        model.config._name_or_path = str(origin)
        furina.export_peft(model, tmp_path / str(number))
        written = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == name


def test_a_generation_config_that_transformers_refuses_is_one_sentence(tmp_path: Path) -> None:
    model = adapted("llama", "lora", torch.float32)
    before = fingerprint(model)
    model.generation_config.temperature = 0.6  # of sampling, which is off
    with pytest.raises(ConfigurationError, match=r"generation_config .*temperature"):
        furina.export_merged(model, tmp_path / "merged")
    assert not any(tmp_path.iterdir()) and fingerprint(model) == before
    model.generation_config.do_sample = True
    furina.export_merged(model, tmp_path / "merged")
