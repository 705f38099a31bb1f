"""A plan says what a run will adapt, compute, hold and take, without its weights or the hub."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from furina.adapters import methods
from furina.adapters.dora import DoRAConfig
from furina.backbones.architectures import ARCHITECTURES
from furina.backbones.load import load_tokenizer
from furina.data.module import TaskDataModule
from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.kernels import processor
from furina.kernels.processor import Precision, cores
from furina.plan import speed
from furina.plan.devices import GPUS, Device
from furina.plan.lengths import epoch_rows, steps_of, training_lengths
from furina.plan.plan import Plan, plan, plan_all
from furina.plan.questions import asked, number_asked
from furina.plan.speed import Speed
from furina.plan.summary import advice, summary
from furina.reporting.tables.render import markdown
from tests.experiment.helpers import tiny

ROOT = Path(__file__).parents[2]
PAPER = [name for name in ARCHITECTURES if "/" in name]
LAYERS = {name: json.loads(ARCHITECTURES[name].read_text())["num_hidden_layers"] for name in PAPER}
pytestmark = pytest.mark.usefixtures("no_network")
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def paper(backbone: str = "meta-llama/Llama-3.2-3B", **changes: Any) -> RunConfig:
    """Return a run at the paper's scale."""
    start: dict[str, Any] = {"protocol": "label", "batch_size": 16, "steps": 100}
    start |= {"test_size": None, "dtype": "bfloat16"}
    return RunConfig().updated({"backbone": backbone, "method": "lora", **start, **changes})


def unread(config: RunConfig, on: str | Device = "h100-80gb") -> Plan:
    return plan(config, on, measure=False)


@pytest.mark.parametrize(
    ("method", "backbone"),
    [*((m, "tiny-llama") for m in methods()), *(("lora", name) for name in PAPER)],
)
def test_every_method_and_every_backbone_is_planned_for(method: str, backbone: str) -> None:
    two_layers = {"adapter": {"allocation": [2, 3]}} if method == "mola" else {}
    found = unread(paper(backbone, method=method, **two_layers))
    assert found.adapted is not None
    blocks = {"self_attn": SEVEN[:4], "mlp": SEVEN[4:]}
    assert set(found.linears) == {
        f"model.layers.{layer}.{block}.{leaf}"
        for layer in range(LAYERS.get(backbone, 2))
        for block, leaves in blocks.items()
        for leaf in leaves
    }
    assert found.hours > 0 and found.memory.total > 2 * found.parameters
    # A forward and the gradients of the inputs; embeddings and the first layer's inputs need none.
    assert found.training_flops > 3.2 * found.tokens * found.parameters * (backbone in PAPER)


def test_furina_has_the_parameters_of_lora_and_one_more_for_each_output() -> None:
    backbone = "meta-llama/Llama-3.2-3B"
    lora = unread(paper(backbone, adapter={"rank": 128}))
    mixture = unread(paper(backbone, method="furina", adapter={"rank": 16, "num_experts": 8}))
    assert lora.adapted is not None
    # Of q and o, k and v, gate and up, and down.
    outputs = 2 * 3072 + 2 * 1024 + 2 * 8192 + 3072
    assert mixture.trainable == lora.trainable + 28 * outputs
    assert mixture.training_flops > lora.training_flops
    assert mixture.memory.total > lora.memory.total


@pytest.mark.parametrize(
    ("field", "values", "grow"),
    [
        ("steps", (10, 100, 1000), "hours training_flops tokens"),
        ("batch_size", (4, 16, 64), "hours training_flops tokens memory.total"),
        ("max_length", (64, 256, 512), "hours training_flops tokens memory.total scoring_flops"),
        ("test_size", (10, 100, None), "hours scoring_flops"),
        ("validation_size", (0, 100, 500), "hours training_flops"),
        ("adapter", ({"rank": 8}, {"rank": 64}), "hours training_flops trainable memory.total"),
        ("dtype", ("bfloat16", "float32"), "memory.total"),
    ],
)
def test_what_should_grow_grows(field: str, values: tuple[Any, ...], grow: str) -> None:
    plans = [unread(paper(**{field: value})) for value in values]
    for name in grow.split():
        found = [attrgetter(name)(each) for each in plans]
        assert all(first < second for first, second in pairwise(found)), name


def test_recomputation_and_smaller_micro_batches_save_memory_and_the_first_costs_time() -> None:
    plain = unread(paper())
    again = unread(paper(gradient_checkpointing=True))
    fewer = unread(paper(micro_batch_size=4))
    assert again.memory.working < plain.memory.working / 4
    assert again.training_hours > 1.2 * plain.training_hours
    assert fewer.memory.working < plain.memory.working / 3
    assert fewer.training_flops == pytest.approx(plain.training_flops)
    ranks = unread(paper(devices=4))
    assert ranks.memory.working == fewer.memory.working
    assert ranks.training_flops == pytest.approx(plain.training_flops)
    shards = unread(paper(devices=4, strategy="fsdp"))
    assert shards.memory.weights * 4 == plain.memory.weights
    assert any("gathers" in note for note in shards.notes)


def test_without_data_tokens_are_at_most_and_it_says_so() -> None:
    found = unread(paper(steps=7, batch_size=3, max_length=40))
    assert found.tokens == 7 * 3 * 40 and found.counted_by == ""
    (note,) = found.notes
    assert "at most" in note and "max_length=40" in note
    assert found.lengths is not None and found.lengths.answer == 2  # a space and a letter


def test_the_untouched_backbone_is_only_scored() -> None:
    base, lora = unread(paper(method="base")), unread(paper())
    assert (base.steps, base.tokens, base.training_flops, base.trainable) == (0, 0, 0, 0)
    assert base.lengths is None and base.linears == ()
    assert 0 < base.hours < lora.hours
    # LoRA is scored unmerged and merged, and a routed mixture cannot be merged.
    assert lora.scoring_flops > 2 * base.scoring_flops
    routed = unread(paper(method="molora"))
    control = unread(paper(method="molora", score_without_router=True))
    assert control.scoring_flops == 2 * routed.scoring_flops


def test_lengths_are_those_of_the_rows(data_dir: str) -> None:
    config = tiny(data_dir, "lora", batch_size=30, micro_batch_size=10, validation_size=0, steps=2)
    data = TaskDataModule(
        load_tokenizer("tiny-llama"),
        *("arc_easy", "text", 30, 10),
        validation_size=0,
        data_dir=data_dir,
    )
    data.setup()
    batches = data.train_dataloader()
    lengths = [len(example.input_ids) for example in batches.examples]
    found = training_lengths(config)
    assert found.mean == pytest.approx(sum(lengths) / 30)
    assert found.tokenizer == "tiny-llama"
    window = batches.window(0)
    assert found.padded == pytest.approx(sum(batch["input_ids"].numel() for batch in window) / 30)
    assert found.longest == max(batch["input_ids"].shape[1] for batch in window)
    answers = sum((batch["labels"] != -100).sum().item() for batch in window)
    assert found.answer == pytest.approx(answers / 30)
    made = plan(config, "cpu")
    assert made.tokens == 2 * sum(lengths) and made.counted_by == "tiny-llama" and not made.notes


def test_sorted_steps_pad_less(data_dir: str) -> None:
    mixture = {"task": "both", "mixture": {"arc_easy": {}, "openbookqa": {"weight": 0.5}}}
    rows = tiny(data_dir, "lora", batch_size=5, micro_batch_size=None, **mixture)
    apart = training_lengths(rows)
    near = training_lengths(rows.updated({"bucket_steps": 6}))
    assert apart.mean == near.mean <= near.padded <= apart.padded <= apart.longest


def test_questions_are_counted_as_they_are_asked(data_dir: str) -> None:
    config = tiny(data_dir)
    encode = load_tokenizer("tiny-llama").encode
    context = "Question: In the test list, what follows 3?\nAnswer:"
    found = asked(config, "arc_easy", "text")
    assert found.choices == 3 and found.tokenizer == "tiny-llama"
    assert found.context == pytest.approx(len(encode(context)), abs=1)
    assert found.read("shared") == found.context + found.continued
    assert found.read("lm_eval") == 3 * found.context + found.continued
    label = asked(config, "arc_easy", "label")
    assert label.choices == 9  # MoE-PEFT compares all of ARC's labels
    assert asked(config, "arc_easy", "lm_eval") == found


def test_written_answers_take_as_long_as_weights_keys_and_values_are_moved() -> None:
    gsm8k = {"protocol": "cot", "task": "gsm8k", "adapter": {"rank": 8}, "max_length": 512}
    found = unread(paper("Qwen/Qwen2-7B", method="lora", **gsm8k))
    card = GPUS["h100-80gb"]
    items, tokens, two_bytes = 1319, 512, 2
    weights = -(-items // 16) * found.parameters
    # Qwen2-7B: 28 layers with 4 heads of keys, and of values, 128 wide; on average half is written.
    kept = items * (512 + tokens / 2) * 28 * 2 * 4 * 128
    seconds = 2 * tokens * two_bytes * (weights + 3 * kept) / (card.bandwidth or 0) / 0.4
    assert found.scoring_hours == pytest.approx(seconds / 3600)
    assert found.scoring_hours > found.scoring_flops / card.speed(paper()).adapted / 3600


def test_epochs_are_steps_by_the_public_counts() -> None:
    config = paper(steps=None, epochs=2, task="arc_easy", batch_size=16, validation_size=251)
    assert epoch_rows(config) == {"arc_easy": 2000}
    assert steps_of(config) == unread(config).steps == 2 * 125
    mixture = {"arc_easy": {"cap": 1000, "weight": 2}, "openbookqa": {"weight": 0.5}}
    both = config.updated({"task": "both", "mixture": mixture, "validation_size": 1})
    assert epoch_rows(both) == {"arc_easy": 2000, "openbookqa": round(4957 / 2)}


def test_a_folder_of_own_rows_is_counted_and_not_the_public_one(data_dir: str) -> None:
    config = tiny(data_dir, "lora", steps=None, epochs=3, validation_size=4)
    assert epoch_rows(config) == {"arc_easy": 26}
    assert steps_of(config) == 20  # of four rows each
    assert number_asked(config.updated({"test_size": None}), "arc_easy") == 12


def test_the_plain_form_is_planned_for_and_costs_more() -> None:
    fast, plain = (unread(paper("tiny-llama", method=m)) for m in ("furina", "furina_plain"))
    assert plain.trainable == fast.trainable and plain.training_flops > fast.training_flops


def test_what_fit_refuses_is_not_planned_for() -> None:
    with pytest.raises(ConfigurationError, match="warmup_steps=101 is more than"):
        unread(paper(warmup_steps=101))


def test_this_machine_is_as_fast_as_it_is_timed(data_dir: str, monkeypatch: Any) -> None:
    asked: list[tuple[str, str, str]] = []

    def timed(method: str, options: str, dtype: str, tokens: int = 512) -> Speed:
        asked.append((method, options, dtype))
        return Speed(training=1e9 * tokens / 512, adapted=2e9, plain=4e9)

    monkeypatch.setattr(speed, "speed", timed)
    sizes = {"dtype": "float32", "batch_size": 64, "micro_batch_size": 12, "validation_size": 0}
    lora, base = (tiny(data_dir, method, **sizes) for method in ("lora", "base"))
    found, plain = plan(lora, "cpu"), plan(base, "cpu")
    assert asked[0] == ("lora", json.dumps(lora.adapter), "float32")
    assert found.lengths is not None
    assert 512 * 0.71 < 12 * found.lengths.padded < 512 * 1.4  # or the rate would be another
    assert 3600 * found.training_hours == pytest.approx(found.training_flops / 1e9)
    longer = plan(lora.updated({"micro_batch_size": 24}), "cpu")
    assert 2 * longer.training_hours == pytest.approx(found.training_hours)
    assert 3600 * plain.scoring_hours == pytest.approx(plain.scoring_flops / 4e9)
    # LoRA is scored with its adapter, and merged as the base is.
    unmerged = found.scoring_flops - plain.scoring_flops
    assert unmerged > plain.scoring_flops
    assert found.scoring_hours == pytest.approx(unmerged / 2e9 / 3600 + plain.scoring_hours)
    (remark, *_) = summary([found]).remarks
    assert f"{cores()} CPU cores at 0.001 TFLOP/s in float32, as timed just now" in remark


def test_written_answers_take_this_machine_as_long_as_it_reads(
    data_dir: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(speed, "speed", lambda *_: Speed(1e15, 1e15, 1e15))
    config = tiny(data_dir, "lora", dtype="float32", task="gsm8k", protocol="cot", source="auto")
    hours = []
    for rate in (1e9, 2e9):
        monkeypatch.setattr(speed, "bandwidth", lambda dtype, rate=rate: rate)
        hours.append(unread(config, "cpu").scoring_hours)
    assert hours[0] == pytest.approx(2 * hours[1])


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_auto_is_planned_as_it_would_run(dtype: str, size: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(processor, "automatic", lambda kind: Precision(dtype, "a test"))
    monkeypatch.setattr(speed, "speed", lambda *_: Speed(1e9, 1e9, 1e9))
    config = paper("tiny-llama", dtype="auto")
    here = unread(config, "cpu")
    assert here.config.dtype == dtype and here.memory == unread(here.config, "cpu").memory
    assert here.memory.weights >= size * here.parameters
    assert unread(config, "h100-80gb").config.dtype == "bfloat16"


@pytest.mark.parametrize("method", methods())
def test_every_method_is_timed_in_a_moment_and_leaves_no_trace(
    method: str, monkeypatch: Any
) -> None:
    for name, least in (("ROWS", 2), ("ANSWERS", 2), ("WARMING", 0), ("REPEATS", 1)):
        monkeypatch.setattr(speed, name, least)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = speed.speed.__wrapped__(method, "{}", "float32", 16)
    assert all(rate > 0 for rate in found)
    assert speed.bandwidth.__wrapped__("float32") > 0
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()


def test_a_card_is_as_fast_as_its_data_sheet() -> None:
    card = GPUS["a100-80gb"]
    found = unread(paper(), "a100-80gb")
    assert found.training_hours == pytest.approx(found.training_flops / (0.4 * 312e12) / 3600)
    assert card.reading(paper()) == pytest.approx(0.4 * 2039e9)
    faster = unread(paper(), "h100-80gb")
    assert found.hours / faster.hours == pytest.approx(989.4 / 312)
    assert "bfloat16" in " ".join(unread(paper(dtype="float32")).notes)


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    config = paper("Qwen/Qwen2-7B", adapter={"rank": 128})
    short = unread(config, "rtx-4090")
    assert short.excess == short.memory.total - 24 * 10**9 > 0
    said = advice(short)
    changes = dict(word.split("=") for word in said.removesuffix(" would fit").split(" and "))
    changes = {name: json.loads(value) for name, value in changes.items()}
    assert set(changes) <= {"gradient_checkpointing", "micro_batch_size"}
    assert not unread(config.updated(changes), "rtx-4090").excess
    small = replace(GPUS["rtx-4090"], memory=10**9)
    assert "no micro-batch fits" in advice(unread(config, small))
    assert "more memory" in advice(unread(paper(method="base"), small))
    assert unread(paper(), "h200").excess == 0


def test_a_method_that_looks_at_weights_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build(*_: object) -> None:
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(DoRAConfig, "build", build)
    with pytest.raises(ConfigurationError, match=r"dora cannot be planned for, .*meta device"):
        unread(paper(method="dora", adapter={"rank": 5, "alpha": 3.0}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backbone": "Qwen/Qwen2-8B"}, "Did you mean 'Qwen/Qwen2-7B'"),
        ({"method": "lorra"}, "Did you mean 'lora'"),
        ({"adapter": {"ranc": 4}}, "Did you mean 'rank'"),
        ({"targets": ["c_attn"]}, "'c_attn' matches no module"),
        ({"method": "mixlora", "targets": ["gate_proj"]}, "whole FFNs"),
        ({"task": "arc_esay"}, "Did you mean 'arc_easy'"),
        ({"score_without_router": True}, "no router"),
    ],
)
def test_what_could_not_run_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        unread(paper().updated(changes))
    assert "\n" not in str(caught.value)
    unread(paper())  # and the backbone is as it was


def test_an_unknown_device_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match=r"'h100-80'.*Did you mean 'h100-80gb'"):
        plan(paper(), "h100-80")


def test_a_backbone_that_is_no_llama_is_planned_for(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPTNeoXConfig

    GPT2Config().save_pretrained(tmp_path / "gpt2")
    GPTNeoXConfig().save_pretrained(tmp_path / "neox")
    base = unread(paper(str(tmp_path / "gpt2"), method="base"))
    assert base.parameters == 124_439_808 and base.hours > 0
    found = unread(paper(str(tmp_path / "neox"), targets=("query_key_value",)))
    assert len(found.linears) == 44 and found.training_hours > 0


def suite() -> list[RunConfig]:
    rows: list[dict[str, Any]] = [
        {"method": "base"},
        {"adapter": {"rank": 128}},
        {"method": "furina", "row": "furina-no-shared", "adapter": {"num_shared_experts": 0}},
    ]
    tasks = ("arc_easy", "openbookqa")
    return [
        paper("Qwen/Qwen2-7B", suite="main-paper", **row, task=t) for row in rows for t in tasks
    ]


def test_the_summary_adds_up() -> None:
    plans = plan_all(suite(), measure=False)
    table = summary(plans)
    rows = [line.split(" | ") for line in markdown(table).splitlines() if "Qwen/Qwen2-7B |" in line]
    assert [row[1] for row in rows] == ["base", "lora", "furina-no-shared"]
    numbers = table.frame.map(lambda cell: cell.numbers.get(""))
    assert list(numbers["", "cells"]) == [2, 2, 2]
    assert numbers["device hours", "together"].sum() == pytest.approx(sum(p.hours for p in plans))
    assert numbers["training", "tokens, M"].sum() == sum(each.tokens for each in plans)
    assert numbers["scoring", "PFLOP"].sum() == sum(each.scoring_flops for each in plans)
    assert numbers["memory", "GB"].max() == max(each.memory.total for each in plans)
    assert numbers["adapted", "parameters, M"][1] == plans[2].trainable
    together = " ".join(table.remarks)
    assert together.startswith("Together 6 cells, ") and "furina-no-shared on" in together
    assert "the untouched backbone trains nothing" in " ".join(table.footnotes)
    assert markdown(summary(plan_all(suite(), measure=False))) == markdown(table)


def test_what_does_not_fit_stands_in_the_table() -> None:
    table = summary(plan_all(suite(), "rtx-4090", measure=False))
    short = table.frame["memory", "short by"]
    assert [cell.bold for cell in short] == [False, True, True]
    assert "would fit" in " ".join(table.footnotes)
    assert any("4 of 6 cells do not fit" in remark for remark in table.remarks)


def test_a_cell_of_two_suites_counts_once() -> None:
    runs = suite()
    shared = runs[2].updated({"suite": "variants-paper", "row": "lora-r128"})
    table = summary(plan_all([*runs, shared], measure=False))
    assert "1 more are cells that another suite has as well." in table.remarks
    cells = table.frame["", "cells"].map(lambda cell: cell.numbers[""])
    assert cells.sum() == 6


def test_nothing_to_plan_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match="no runs to plan"):
        summary([])
