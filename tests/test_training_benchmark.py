"""benchmarks/training.py: what it times, how it compares, and what it writes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import furina
from furina.errors import FurinaError

FOLDER = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--backbone", "tiny-llama", "--rows", "2", "--tokens", "12", "--rank", "8"]
SMALL += ["--experts", "4", "--rounds", "1", "--threads", "1"]
CHOSEN = ["floor", "lora", "furina", "same_loop/peft_lora", "as_shipped/peft_lora"]
WORKER = """
import json, sys
setup = json.loads(input())
assert (setup["method"], setup["checkpoint"]) == ("mola", "CHECKPOINT")
print(json.dumps({"trainable": len(setup["targets"]), "versions": {}}), flush=True)
answers = {"step 1": [0.5], "loss": 2.5, "memory 3": 1000}
for line in sys.stdin:
    print(json.dumps(answers.get(line.strip(), {"error": "no such command"})), flush=True)
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Return a function that imports a benchmark's module by name."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def report_of(rounds: dict[str, list[float]], **more) -> dict:
    hardware = {"cpu": "a processor", "accelerator": None, "cores": 2}
    settings = {"rows": 2, "tokens": 10, "backbone": "tiny-llama", "dtype": "bfloat16", "rank": 8}
    settings |= {"attention": "eager", "experts": 4, "dropout": 0.0, "rounds": 3, "threads": 1}
    environment = {"hardware": hardware, "packages": {"torch": "2"}, "commit": None, "dirty": None}
    report = {"settings": settings, "environment": environment, "rounds": [rounds], "ratios": {}}
    report["command"] = "python benchmarks/training.py"
    report |= {"memory_bytes": {}, "trainable": {}, "first_loss": {}, "ratios_to": {}}
    return {**report, "failed": {}, **more}


def test_the_script_times_ours_and_peft_and_writes_what_it_prints(load, tmp_path, capsys):
    training = load("training")
    only = ["--only", "floor", "lora", "furina", "peft_lora", "moe_peft_mola"]
    absent = ["--moe-peft", str(tmp_path / "absent")]
    training.main([*SMALL, *only, *absent, "--results", str(tmp_path / "results")])
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(report["seconds"]) == CHOSEN
    assert all(spread["median"] > 0 for spread in report["seconds"].values())
    # Our own group, peft's and moe_peft's each have a round of what they share.
    assert [spread["n"] for spread in report["seconds"].values()] == [3, 3, 3, 1, 1]
    assert set(report["ratios"]) >= {
        *("same_loop/furina/lora", "same_loop/furina/floor", "same_loop/furina/peft_lora"),
        "as_shipped/furina/peft_lora",
    }
    assert report["environment"]["packages"].keys() >= {"torch", "peft"}
    assert report["trainable"]["lora"] == report["trainable"]["same_loop/peft_lora"] > 0
    missing = "moe_peft is not installed: run `make moe-peft`"
    assert report["failed"] == {f"{loop}/moe_peft_mola": missing for loop in ("as_shipped", "kept")}
    written = tmp_path / "results"
    assert json.loads((written / "step.json").read_text()) == report
    assert (written / "step.md").read_text() == load("training_report").markdown(report)
    assert "<svg" in (written / "step.svg").read_text()


def test_every_variant_starts_at_the_same_loss(load):
    training = load("training")
    options = training.parse([*SMALL, "--dtype", "float32"])
    with training.running(CHOSEN, options) as (variants, failed):
        _, losses = training.time_rounds(variants, failed, 0, seed=0)
    assert not failed
    selection_loss = losses.pop("furina") - losses["floor"]
    assert 0 < selection_loss < 1
    assert list(losses.values()) == pytest.approx([losses["floor"]] * 4, rel=1e-5)


def test_variants_share_the_backbone_and_steps_move_only_the_adapter(load):
    training = load("training")
    options = training.parse([*SMALL, "--dtype", "float32"])
    model, batch = training.prepare(options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora, furina_ = (training.make(name, model, batch, options) for name in ("lora", "furina"))
    start = {n: p.detach().clone() for n, p in furina.adapter_parameters(furina_.model).items()}
    for variant in (lora, furina_):
        variant.seconds()
        variant.seconds()
    weights = [m.model.get_input_embeddings().weight for m in (lora, furina_)]
    assert weights[0] is weights[1] is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = furina.adapter_parameters(furina_.model)
    assert all(not torch.equal(moved[name], tensor) for name, tensor in start.items())
    assert all(parameter.grad is None for parameter in furina_.model.parameters())


def test_every_method_gets_the_total_rank(load):
    variants, training = load("training_variants"), load("training")
    options = training.parse(["--rank", "128", "--experts", "8"])
    for method, config in furina.methods().items():
        chosen = variants.method_options(method, options)
        made = furina.configure(method, chosen)
        assert isinstance(made, config) and made.dropout == 0
        experts = chosen.get("num_experts", chosen.get("allocation", [1])[0])
        assert chosen["rank"] * experts == 128


def test_a_ratio_is_the_median_of_the_rounds_own(load):
    ratios = load("training_report").ratios
    # 1/2, 1 and 3; the quotient of the medians is 2.
    rounds = {"furina": [2.0, 8.0, 9.0], "lora": [4.0, 8.0, 3.0]}
    assert ratios([rounds], {}) == {"same_loop/furina/lora": 1.0}
    with pytest.raises(ValueError):
        ratios([{"furina": [1.0], "lora": [1.0, 2.0]}], {})


def test_times_of_different_groups_are_never_compared(load):
    ratios = load("training_report").ratios
    assert ratios([{"furina": [1.0]}, {"lora": [1.0]}], {}) == {}
    # 1/2, 1 and 3 again, in two groups.
    groups = [{"furina": [2.0], "lora": [4.0]}, {"lora": [8.0, 3.0], "furina": [8.0, 9.0]}]
    assert ratios(groups, {}) == {"same_loop/furina/lora": 1.0}


def test_every_ratio_has_its_two_variants_in_one_group(load):
    training, reporting = load("training"), load("training_report")
    groups = training.grouped(training.variant_names())
    assert {name for group in groups for name in group} == set(training.variant_names())
    for key, one, other in reporting.pairs():
        assert any({one, other} <= set(group) for group in groups), key
    assert all({"floor", "lora", "furina"} <= set(group) for group in groups)


def test_memory_at_other_numbers_of_experts_is_compared_with_the_usual_one(load):
    training, reporting = load("training"), load("training_report")
    options = training.parse(["--memory-experts", "2", "8"])
    cases = training.memory_cases(options)
    assert list(cases) == [  # with two experts there is one to choose from, so no loss
        "furina_no_loss, experts: 2",
        "furina, experts: 8",
        "furina_no_loss, experts: 8",
    ]
    assert cases["furina, experts: 8"] == ["--one", "furina", "--experts", "8"]
    memory = dict(zip(cases, (50, 80, 100), strict=True))
    assert reporting.expert_ratios(memory, 8) == {
        "memory/furina/experts_8/experts_8": 1.0,
        "memory/furina_no_loss/experts_2/experts_8": 0.5,
        "memory/furina_no_loss/experts_8/experts_8": 1.0,
    }


def test_ratios_name_the_loop_and_memory_is_compared_too(load):
    ratios = load("training_report").ratios
    memory = {"furina": 50, "same_loop/peft_lora": 100, "as_shipped/peft_lora": 200}
    assert ratios([], memory) == {
        "memory/furina/peft_lora": 0.5,
        "memory/as_shipped/furina/peft_lora": 0.25,
    }


def test_the_table_is_made_from_the_json_alone(load):
    training, reporting = load("training"), load("training_report")
    rounds = {"lora": [1.0, 2.0, 3.0], "furina": [2.0, 2.0, 9.0]}
    report = report_of(
        rounds,
        seconds={name: training.spread(values) for name, values in rounds.items()},
        ratios=reporting.ratios([rounds], {}),
        ratios_to={"lora": reporting.ratios_to([rounds], "lora")},
        memory_bytes={"furina": 3 * 2**20},
        failed={"as_shipped/moe_peft_mola": "it cannot run"},
    )
    table = reporting.markdown(json.loads(json.dumps(report)))
    assert "| furina | – | 2.000 | 2.000 to 5.500 | 10 | 2.00 | 3 |" in table
    assert "as\\_shipped/moe\\_peft\\_mola: it cannot run." in table
    assert "| same\\_loop/furina/lora | 2.00 |" in table


def test_one_round_has_no_quartiles_of_its_own(load):
    assert load("training").spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 1}


def test_a_variant_that_fails_is_named_and_the_others_go_on(load):
    training = load("training")

    class Fake:
        loss = 1.0

        def __init__(self, *seconds: float) -> None:
            self.times = list(seconds)

        def seconds(self) -> float:
            if not self.times:
                raise FurinaError("the process ended")
            return self.times.pop(0)

    failed: dict[str, str] = {}
    variants = {"lora": Fake(9.0, 1.0, 2.0), "furina": Fake(9.0, 1.0)}
    seconds, losses = training.time_rounds(variants, failed, 2, seed=0)
    assert (seconds, list(losses)) == ({"lora": [1.0, 2.0]}, ["lora"])
    assert failed == {"furina": "the process ended"}


RISE = """
import sys; sys.path.insert(0, sys.argv[1])
import torch; from peak_memory import rise
held = torch.ones(2**24)
for _ in range(3): print(rise(lambda: held + 1, [held]))
"""


def test_the_rise_of_memory_counts_what_a_run_allocates(load):
    peak_memory, held = load("peak_memory"), torch.ones(2**24)
    if not os.access(peak_memory.CLEAR, os.W_OK):  # no figure then, rather than a wrong one
        with pytest.raises(OSError):
            peak_memory.rise(lambda: held + 1, [held])
        return
    # In a process of its own: one that has run before takes what it had freed. The kernel counts
    # pages in batches, so a few may be missing; a busy one takes back others.
    asked = [sys.executable, "-c", RISE, str(FOLDER)]
    risen = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert max(map(int, risen.split())) == pytest.approx(2**26, rel=0.1)


def test_an_unknown_variant_is_refused(load):
    with pytest.raises(SystemExit, match="no variant is called lara"):
        load("training").select(["lara"])


@pytest.mark.parametrize("loop, checkpoint", [("as_shipped", "recompute"), ("kept", "none")])
def test_moe_peft_is_stepped_through_lines_of_its_process(
    load, tmp_path, monkeypatch, loop, checkpoint
):
    training, peers = load("training"), load("training_peers")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "worker.py").write_text(WORKER.replace("CHECKPOINT", checkpoint))
    monkeypatch.setattr(peers, "WORKER", tmp_path / "worker.py")
    options = training.parse([*SMALL, "--moe-peft", str(tmp_path)])
    batch = training.random_batch(50, options)
    peer = peers.Peer(f"{loop}/moe_peft_mola", batch, options)
    try:
        answers = (peer.trainable, peer.seconds(), peer.loss, peer.memory(3))
        assert answers == (7, 0.5, 2.5, 1000)
        with pytest.raises(peers.PeerError, match="no such command"):
            peer.memory(4)
    finally:
        peer.close()


def test_a_config_is_put_in_the_words_of_transformers_4(load):
    config = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "dtype": "bfloat16"}
    assert load("training_peers").legacy_config(config) == {
        "rope_theta": 1e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }


@pytest.mark.parametrize("experts", ["3", "0"])
def test_experts_that_cannot_share_the_rank_are_refused_before_anything_runs(load, experts, capsys):
    with pytest.raises(SystemExit):
        load("training").parse(["--rank", "8", "--experts", "4", "--memory-experts", experts])
    assert "--memory-experts must" in capsys.readouterr().err
