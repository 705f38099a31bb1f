"""benchmarks/latency: what it times, how it compares, and what it writes."""

from __future__ import annotations

import pytest
import torch

import furina
from benchmarks.common import moe_peft, rounds
from benchmarks.latency import decoding, page, variants
from furina.errors import FurinaError
from furina.evaluation.latency import Timing
from furina.model.state import state_of
from tests.benchmarks.helpers import environment, printed, written

SMALL = ["--backbone", "tiny-llama", "--rank", "8", "--experts", "4", "--threads", "1"]
SMALL += ["--prompt-tokens", "6", "--new-tokens", "3", "--rounds", "2", "--warmup", "0"]
CHOSEN = ["base", "furina_unmerged", "furina_merged", "peft_lora_unmerged", "disk_base"]
CHOSEN += ["disk_merged"]
WORKER = """
import json, sys
input()
print(json.dumps({"trainable": 7, "versions": {"moe_peft": "9"}}), flush=True)
for line in sys.stdin:
    command, prompt, count = json.loads(line)
    seconds = [0.5 * len(prompt)] + [0.001 * len(prompt[0])] * (count - 1)
    print(json.dumps(seconds if command == "generate" else {"error": "no"}), flush=True)
"""


def model_of(name: str, dtype: str = "float64"):
    options = decoding.parse([*SMALL, "--dtype", dtype])
    backbone = furina.load_backbone("tiny-llama", dtype).requires_grad_(False)
    return variants.variant_model(name, backbone, options).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25).reshape(2, -1)).logits


def test_the_script_times_and_writes_what_it_prints(tmp_path, capsys):
    absent = ["--moe-peft", str(tmp_path / "absent"), "--batch-sizes", "1", "2"]
    only = ["--only", *CHOSEN, "moe_peft_mola"]
    decoding.main([*SMALL, *absent, *only, "--results", str(tmp_path / "results")])
    report = printed(capsys)
    assert [(cell["batch"], cell["prompt_tokens"]) for cell in report["cells"]] == [(1, 6), (2, 6)]
    first = report["cells"][0]
    assert list(first["times"]) == CHOSEN
    assert {times["total_ms"]["n"] for times in first["times"].values()} == {2}
    keys = {"merged/base", "furina_unmerged/base", "furina_merged/base"}
    assert {*keys, "furina_unmerged/peft_lora_unmerged"} <= set(report["ratios"])
    assert report["ratios"] == first["ratios"]
    missing = "moe_peft is not installed: run `make moe-peft`"
    assert report["failed"] == {"moe_peft_mola": missing}
    stem = tmp_path / "results" / "latency"
    assert written(stem) == (report, page.page(report).markdown("latency"))
    assert "<svg" in stem.with_suffix(".svg").read_text()


@pytest.mark.parametrize("method", ["lora", "furina"])
def test_the_written_out_form_is_the_adapter(method):
    fast, literal, merged = (
        logits(model_of(f"{method}_{way}")) for way in ("unmerged", "literal", "merged")
    )
    assert (fast - logits(model_of("base"))).abs().max() > 1e-3
    torch.testing.assert_close(literal, fast, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merged, fast, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["lora", "furina"])
def test_what_is_compiled_unmerged_is_the_adapters_factors_alone(method, monkeypatch):
    compiled = []

    def compile_(forward, **_):
        compiled.append(forward)
        return forward

    monkeypatch.setattr(torch, "compile", compile_)
    options = decoding.parse([*SMALL])
    backbone = furina.load_backbone("tiny-llama", "float64").requires_grad_(False)
    timer = variants.build(f"compiled_{method}_unmerged", backbone, options)
    assert timer(torch.arange(5, 11).reshape(1, -1), 3).total_ms > 0
    model = compiled[0].__self__
    assert state_of(model).config.name == "lora" and state_of(model).config.scale == 1
    adapter = logits(model_of(f"{method}_unmerged"))
    torch.testing.assert_close(logits(model), adapter, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("peer", ["peft_lora", "peft_dora"])
def test_a_peers_merged_model_is_its_unmerged_one(peer):
    unmerged, merged = (
        logits(model_of(f"{peer}_{way}", "float32")) for way in ("unmerged", "merged")
    )
    assert (unmerged - logits(model_of("base", "float32"))).abs().max() > 1e-3
    # Products of a few hundred fp32 terms through two layers.
    torch.testing.assert_close(merged, unmerged, rtol=1e-3, atol=1e-4)


def test_the_merged_folder_is_the_base_class_for_class_and_key_for_key():
    base, merged = (model_of(name, "bfloat16") for name in ("disk_base", "disk_merged"))

    def graph(model):
        modules = [(name, type(module)) for name, module in model.named_modules()]
        tensors = [(k, v.dtype, v.shape, v.stride()) for k, v in model.state_dict().items()]
        return modules, tensors, model.config.to_dict() | {"_name_or_path": None}

    assert graph(base) == graph(merged)
    assert not torch.equal(logits(base), logits(merged))


def test_variants_share_the_backbone_unless_their_weights_change():
    options = decoding.parse([*SMALL, "--dtype", "float32"])
    backbone = furina.load_backbone("tiny-llama", "float32").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    unmerged = variants.variant_model("furina_unmerged", backbone, options)
    for method in ("furina", "pissa"):
        variants.variant_model(f"{method}_merged", backbone, options)
    variants.variant_model("pissa_unmerged", backbone, options)
    own = backbone.get_input_embeddings().weight
    assert unmerged.get_input_embeddings().weight is own
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_every_method_is_timed_merged_where_it_merges():
    names = variants.variant_names()
    for method, config in furina.methods().items():
        assert f"{method}_unmerged" in names
        assert (f"{method}_merged" in names) == config().mergeability().ok
    assert len(set(names)) == len(names)


def test_ratios_are_paired_by_round_and_per_token():
    clock = {"base": iter([1.0, 10.0, 2.0]), "furina_unmerged": iter([2.0, 30.0, 2.0])}

    def timer(name):
        return lambda prompt, count: Timing(100.0, next(clock[name]), 500.0)

    options = decoding.parse([*SMALL, "--rounds", "3"])
    backbone = furina.load_backbone("tiny-llama")
    timers = {name: timer(name) for name in clock}
    cell = decoding.time_cell(timers, backbone, (4, 6), options)
    assert cell["ratios"] == {"furina_unmerged/base": 2.0}  # of 2, 3 and 1, in whatever order
    assert cell["intervals"]["furina_unmerged/base"] == (1.0, 3.0)
    assert cell["tokens_per_second"]["base"] == 4 * 3 / 0.5


def test_the_interval_of_a_median_narrows_with_rounds():
    interval = rounds.median_interval
    assert interval([1.0]) == (1.0, 1.0)
    few, many = interval([0.9, 1.0, 1.1] * 2), interval([0.9, 1.0, 1.1] * 40)
    assert few[0] <= many[0] <= 1.0 <= many[1] <= few[1]
    assert many == (1.0, 1.0)
    # 40 values of which half are below 1: an interval around it that most of them lie outside.
    low, high = interval([1 + (i - 19.5) / 100 for i in range(40)])
    assert 0.9 < low < 1 < high < 1.1


def test_a_variant_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    real = decoding.build

    def build(name, backbone, options):
        if name == "furina_unmerged":
            raise FurinaError("no room")
        return real(name, backbone, options)

    monkeypatch.setattr(decoding, "build", build)
    decoding.main([*SMALL, "--only", "base", "furina_unmerged"])
    report = printed(capsys)
    assert report["failed"] == {"furina_unmerged": "no room"}
    assert list(report["cells"][0]["times"]) == ["base"]
    assert "furina\\_unmerged: no room." in page.page(report).markdown("latency")


def test_moe_peft_generates_in_its_own_process(tmp_path, monkeypatch):
    made = environment(tmp_path, WORKER)
    monkeypatch.setattr(moe_peft, "WORKER", made / "worker.py")
    options = decoding.parse([*SMALL, "--moe-peft", str(made)])
    timer = variants.build("moe_peft_mola", furina.load_backbone("tiny-llama"), options)
    try:
        timing = timer(torch.ones(2, 5, dtype=torch.long), 4)
    finally:
        timer.close()
    assert timing == pytest.approx((1000.0, 5.0, 1015.0))
    assert timer.versions == {"moe_peft": "9"}


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--experts", "3"], ["--new-tokens", "1"]])
def test_impossible_counts_are_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        decoding.parse([*SMALL, *wrong])
    assert stop.value.code == 2
    assert "must" in capsys.readouterr().err


def test_an_unknown_variant_is_refused():
    with pytest.raises(SystemExit, match="no variant is called lara"):
        decoding.chosen(["lara"])
