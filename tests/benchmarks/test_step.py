"""benchmarks/training/step.py: what it times, how it compares, and what it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

import furina
from benchmarks.common import memory, models, moe_peft, rounds
from benchmarks.common.worker import ROOT, WorkerError
from benchmarks.training import step, step_page, variants
from furina.errors import FurinaError
from tests.benchmarks.helpers import environment, printed, written

SMALL = ["--backbone", "tiny-llama", "--rows", "2", "--tokens", "12", "--rank", "8"]
SMALL += ["--experts", "4", "--rounds", "1", "--threads", "1"]
CHOSEN = ["floor", "lora", "furina", "same_loop/peft_lora", "as_shipped/peft_lora"]
WORKER = """
import json, sys
setup = json.loads(input())
assert (setup["method"], setup["checkpoint"]) == ("mola", "CHECKPOINT")
print(json.dumps({"trainable": len(setup["targets"]), "versions": {}}), flush=True)
answers = {"step": [0.5, 2.5], "memory 3": 1000}
for line in sys.stdin:
    words = " ".join(map(str, json.loads(line)))
    print(json.dumps(answers.get(words, {"error": "no such command"})), flush=True)
"""


def report_of(rounds: dict[str, list[float]], **more) -> dict:
    hardware = {"cpu": "a processor", "accelerator": None, "cores": 2}
    settings = {"rows": 2, "tokens": 10, "backbone": "tiny-llama", "dtype": "bfloat16", "rank": 8}
    settings |= {"attention": "eager", "experts": 4, "dropout": 0.0, "rounds": 3, "threads": 1}
    environment = {"hardware": hardware, "packages": {"torch": "2"}, "commit": None, "dirty": None}
    report = {"settings": settings, "environment": environment, "rounds": [rounds], "ratios": {}}
    report["command"] = "python -m benchmarks.training.step"
    report |= {"memory_bytes": {}, "trainable": {}, "first_loss": {}, "ratios_to": {}}
    return {**report, "failed": {}, **more}


def test_the_script_times_ours_and_peft_and_writes_what_it_prints(tmp_path, capsys):
    only = ["--only", "floor", "lora", "furina", "peft_lora", "moe_peft_mola"]
    absent = ["--moe-peft", str(tmp_path / "absent")]
    step.main([*SMALL, *only, *absent, "--results", str(tmp_path / "results")])
    report = printed(capsys)
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
    stem = tmp_path / "results" / "step"
    assert written(stem) == (report, step_page.page(report).markdown("step"))
    assert "<svg" in stem.with_suffix(".svg").read_text()


def test_every_variant_starts_at_the_same_loss():
    options = step.parse([*SMALL, "--dtype", "float32"])
    failed: dict[str, str] = {}
    with step.running(CHOSEN, failed, options) as running:
        _, losses = step.time_rounds(running, failed, 0, seed=0)
    assert not failed
    selection_loss = losses.pop("furina") - losses["floor"]
    assert 0 < selection_loss < 1
    assert list(losses.values()) == pytest.approx([losses["floor"]] * 4, rel=1e-5)


def test_variants_share_the_backbone_and_steps_move_only_the_adapter():
    options = step.parse([*SMALL, "--dtype", "float32"])
    model, batch = step.prepare(options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lora, furina_ = (step.make(name, model, batch, options) for name in ("lora", "furina"))
    start = {n: p.detach().clone() for n, p in furina.adapter_parameters(furina_.model).items()}
    for variant in (lora, furina_):
        variant.step()
        variant.step()
    weights = [m.model.get_input_embeddings().weight for m in (lora, furina_)]
    assert weights[0] is weights[1] is model.get_input_embeddings().weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    moved = furina.adapter_parameters(furina_.model)
    assert all(not torch.equal(moved[name], tensor) for name, tensor in start.items())
    assert all(parameter.grad is None for parameter in furina_.model.parameters())


def test_every_method_gets_the_total_rank():
    options = step.parse(["--rank", "128", "--experts", "8"])
    for method, config in furina.methods().items():
        chosen = models.method_options(method, options)
        made = furina.configure(method, chosen)
        assert isinstance(made, config) and made.dropout == 0
        experts = chosen.get("num_experts", chosen.get("allocation", [1])[0])
        assert chosen["rank"] * experts == 128


def test_a_ratio_is_the_median_of_the_rounds_own():
    ratios = step_page.ratios
    # 1/2, 1 and 3; the quotient of the medians is 2.
    rounds = {"furina": [2.0, 8.0, 9.0], "lora": [4.0, 8.0, 3.0]}
    assert ratios([rounds], {}) == {"same_loop/furina/lora": 1.0}
    with pytest.raises(ValueError):
        ratios([{"furina": [1.0], "lora": [1.0, 2.0]}], {})


def test_times_of_different_groups_are_never_compared():
    ratios = step_page.ratios
    assert ratios([{"furina": [1.0]}, {"lora": [1.0]}], {}) == {}
    # 1/2, 1 and 3 again, in two groups.
    groups = [{"furina": [2.0], "lora": [4.0]}, {"lora": [8.0, 3.0], "furina": [8.0, 9.0]}]
    assert ratios(groups, {}) == {"same_loop/furina/lora": 1.0}


def test_every_ratio_has_its_two_variants_in_one_group():
    groups = step.grouped(step.variant_names())
    assert {name for group in groups for name in group} == set(step.variant_names())
    for key, one, other in step_page.pairs():
        assert any({one, other} <= set(group) for group in groups), key
    assert all({"floor", "lora", "furina"} <= set(group) for group in groups)


def test_memory_at_other_numbers_of_experts_is_compared_with_the_usual_one():
    options = step.parse(["--memory-experts", "2", "8"])
    cases = step.memory_cases(options)
    assert list(cases) == [  # with two experts there is one to choose from, so no loss
        "furina_no_loss, experts: 2",
        "furina, experts: 8",
        "furina_no_loss, experts: 8",
    ]
    assert cases["furina, experts: 8"] == ["--one", "furina", "--experts", "8"]
    memory = dict(zip(cases, (50, 80, 100), strict=True))
    assert step_page.expert_ratios(memory, 8) == {
        "memory/furina/experts_8/experts_8": 1.0,
        "memory/furina_no_loss/experts_2/experts_8": 0.5,
        "memory/furina_no_loss/experts_8/experts_8": 1.0,
    }


def test_ratios_name_the_loop_and_memory_is_compared_too():
    ratios = step_page.ratios
    memory = {"furina": 50, "same_loop/peft_lora": 100, "as_shipped/peft_lora": 200}
    assert ratios([], memory) == {
        "memory/furina/peft_lora": 0.5,
        "memory/as_shipped/furina/peft_lora": 0.25,
    }


def test_the_table_is_made_from_the_json_alone():
    group = {"lora": [1.0, 2.0, 3.0], "furina": [2.0, 2.0, 9.0]}
    report = report_of(
        group,
        seconds={name: rounds.spread(values) for name, values in group.items()},
        ratios=step_page.ratios([group], {}),
        ratios_to={"lora": step_page.ratios_to([group], "lora")},
        memory_bytes={"furina": 3 * 2**20},
        failed={"as_shipped/moe_peft_mola": "it cannot run"},
    )
    table = step_page.page(json.loads(json.dumps(report))).markdown("step")
    assert "| furina | – | 2.000 | 2.000 to 5.500 | 10 | 2.00 | 3 |" in table
    assert "as\\_shipped/moe\\_peft\\_mola: it cannot run." in table
    assert "| same\\_loop/furina/lora | 2.00 |" in table


def test_one_round_has_no_quartiles_of_its_own():
    assert rounds.spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 1}


def test_a_variant_that_fails_is_named_and_the_others_go_on():

    class Fake:
        def __init__(self, *seconds: float) -> None:
            self.times = list(seconds)

        def step(self) -> tuple[float, float]:
            if not self.times:
                raise FurinaError("the process ended")
            return self.times.pop(0), 1.0

    failed: dict[str, str] = {}
    fakes: Any = {"lora": Fake(9.0, 1.0, 2.0), "furina": Fake(9.0, 1.0)}
    seconds, losses = step.time_rounds(fakes, failed, 2, seed=0)
    assert (seconds, list(losses)) == ({"lora": [1.0, 2.0]}, ["lora"])
    assert failed == {"furina": "the process ended"}


RISE = """
import torch; from benchmarks.common.memory import rise
held = torch.ones(2**24)
for _ in range(3): print(rise(lambda: held + 1, [held]))
"""


def test_the_rise_of_memory_counts_what_a_run_allocates():
    held = torch.ones(2**24)
    if not os.access(memory.CLEAR, os.W_OK):  # no figure then, rather than a wrong one
        with pytest.raises(OSError):
            memory.rise(lambda: held + 1, [held])
        return
    # In a process of its own: one that has run before takes what it had freed. The kernel counts
    # pages in batches, so a few may be missing; a busy one takes back others.
    asked = [sys.executable, "-c", RISE]
    risen = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert max(map(int, risen.split())) == pytest.approx(2**26, rel=0.1)


def test_an_unknown_variant_is_refused():
    with pytest.raises(SystemExit, match="no variant is called lara"):
        step.chosen(["lara"])


@pytest.mark.parametrize("loop, checkpoint", [("as_shipped", "recompute"), ("kept", "none")])
def test_moe_peft_is_stepped_through_lines_of_its_process(tmp_path, monkeypatch, loop, checkpoint):
    made = environment(tmp_path, WORKER.replace("CHECKPOINT", checkpoint))
    monkeypatch.setattr(moe_peft, "WORKER", made / "worker.py")
    options = step.parse([*SMALL, "--moe-peft", str(made)])
    batch = variants.random_batch(50, options.rows, options.tokens, options.seed)
    peer = moe_peft.Peer(f"{loop}/moe_peft_mola", batch, options)
    try:
        answers = (peer.trainable, peer.step(), peer.memory(3))
        assert answers == (7, (0.5, 2.5), 1000)
        with pytest.raises(WorkerError, match="no such command"):
            peer.memory(4)
    finally:
        peer.close()


def test_a_config_is_put_in_the_words_of_transformers_4():
    config = {"rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}, "dtype": "bfloat16"}
    assert moe_peft.legacy_config(config) == {
        "rope_theta": 1e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }


@pytest.mark.parametrize("experts", ["3", "0"])
def test_experts_that_cannot_share_the_rank_are_refused_before_anything_runs(experts, capsys):
    with pytest.raises(SystemExit):
        step.parse(["--rank", "8", "--experts", "4", "--memory-experts", experts])
    assert "--memory-experts must" in capsys.readouterr().err
