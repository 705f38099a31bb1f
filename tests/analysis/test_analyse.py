"""From a model and items to a record, in memory and on the command line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import furina
from furina import cli
from furina.adapters.mixture import MixtureLinear
from furina.analysis import TaskItems, analyse
from furina.backbones.load import backbone_hash, load_backbone
from furina.backbones.tiny import tiny_tokenizer
from furina.data.batches import collate, encode_examples
from furina.data.items import Question, data_hash
from furina.data.protocols import get_protocol
from furina.data.splits import test_subset as subset_of
from furina.data.tasks import get_task
from furina.errors import ConfigurationError
from furina.model.state import state_of
from furina.records import ActivityRecord, Backbone
from tests.analysis import naive
from tests.analysis.test_activity import MIXTURES
from tests.evaluation.conftest import QUESTIONS
from tests.experiment.helpers import write_data
from tests.helpers import methods, perturb, small

BACKBONE = Backbone("tiny-llama", "0" * 64)
OTHERS = [
    Question(f"other-{n}", f"How many are {n} and 1", (str(n), str(n + 1)), 1) for n in range(12)
]
TASKS = {"arc_easy": TaskItems("text", QUESTIONS), "openbookqa": TaskItems("label", OTHERS)}


def model_of(method: str = "furina", dtype: str = "float64", **options: Any):
    model = furina.adapt(load_backbone("tiny-llama", dtype), small(method, **options), seed=0)
    perturb(model)
    return model


def analysed(model: Any, tasks: dict[str, TaskItems] = TASKS, **options: Any) -> ActivityRecord:
    return analyse(model, tiny_tokenizer(), tasks, **({"backbone": BACKBONE} | options))


@pytest.fixture(scope="module")
def record() -> ActivityRecord:
    return analysed(model_of(), size=6)


@pytest.mark.parametrize("method", methods())
def test_every_method_gives_a_record_or_is_refused_in_one_sentence(
    method: str, tmp_path: Path
) -> None:
    model = model_of(method, "float32")
    if method not in MIXTURES:
        said = rf"This {method} adapter has no experts to select from: [^.\n]+\."
        with pytest.raises(ConfigurationError) as caught:
            analysed(model)
        assert re.fullmatch(said, str(caught.value))
        return
    found = analysed(model)
    found.write(tmp_path / "record.json")
    assert ActivityRecord.read(tmp_path / "record.json") == found
    assert (found.row, found.method) == (method, method)
    assert found.adapter == state_of(model).config.to_dict()
    assert found.top_k == model.get_submodule(found.linears[0]).most_active
    assert [task.task for task in found.tasks] == list(TASKS)
    for task in found.tasks:
        for load in (*task.frequency, *task.share, *task.first):
            assert sum(load) == pytest.approx(1, abs=1e-5)
        for share, even in zip(task.top_k_share, found.even_top_k_share, strict=True):
            assert even - 1e-6 <= share <= 1 + 1e-6
        assert all(0 <= value <= 1 + 1e-6 for value in task.entropy)
    assert all(value is not None and 0 < value < 1 for value in found.weights.similarity)
    assert ("effective_rank" in found.missing) == (found.weights.effective_rank is None)
    assert ("shared_part" in found.missing) == (found.tasks[0].shared_part is None)
    assert (method == "furina") == (found.missing == {})


def test_the_record_says_what_was_read(record: ActivityRecord) -> None:
    asked = {"arc_easy": QUESTIONS, "openbookqa": OTHERS}
    for task in record.tasks:
        name, items = subset_of(asked[task.task], 6, 0)
        protocol = get_protocol(TASKS[task.task].protocol)
        rows = encode_examples(tiny_tokenizer(), get_task(task.task), items, protocol, 512)
        assert (task.subset, task.items, task.sha256) == (name, 6, data_hash(items))
        assert (task.protocol, task.protocol_version) == (protocol.name, str(protocol.version))
        assert task.tokens == sum(len(row.input_ids) for row in rows)
    assert record.backbone == BACKBONE
    assert "torch" in record.provenance.packages


def test_the_numbers_are_those_of_loops_over_prompt_and_answer(record: ActivityRecord) -> None:
    model = model_of()
    items = subset_of(QUESTIONS, 6, 0)[1]
    rows = encode_examples(tiny_tokenizer(), get_task("arc_easy"), items, get_protocol("text"), 512)
    i = record.linears.index("model.layers.1.self_attn.v_proj")
    name = record.linears[i]
    heard = naive.inputs(model, [name], collate(rows, 0))[name]
    layer = model.get_submodule(name)
    expected = naive.numbers(naive.shares(layer, heard), 2)
    task = record.tasks[0]
    assert len(heard) == task.tokens
    assert task.top_k_share[i] == pytest.approx(expected["top_k_share"], rel=1e-5)
    assert task.entropy[i] == pytest.approx(expected["entropy"], rel=1e-5)
    assert task.frequency[i] == pytest.approx(expected["frequency"], rel=1e-5)
    assert task.share[i] == pytest.approx(expected["share"], rel=1e-5)
    assert task.first[i] == pytest.approx(expected["first"], rel=1e-5)
    shared, routed = naive.norms(layer, heard)
    assert task.shared_part is not None
    assert task.shared_part[i] == pytest.approx(shared / (shared + routed), rel=1e-5)


def test_the_weights_are_compared_linear_by_linear(record: ActivityRecord) -> None:
    model = model_of()
    weights = record.weights
    assert weights.linears == record.linears and weights.effective_rank is not None
    for i in (0, 13):
        layer = model.get_submodule(weights.linears[i])
        products = [matrix.flatten() for matrix in naive.matrices(layer)]
        pairs = [
            torch.cosine_similarity(products[m], products[n], dim=0).abs().item()
            for m in range(len(products))
            for n in range(m)
        ]
        assert weights.similarity[i] == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
        sigma = torch.linalg.svd(layer.delta()).S
        q = sigma / sigma.sum()
        expected = torch.exp(-(q * q.clamp(min=1e-300).log()).sum()).item()
        assert weights.effective_rank[i] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_does_not_matter(batch_size: int, record: ActivityRecord) -> None:
    other = analysed(model_of(), size=6, batch_size=batch_size)
    for one, two in zip(record.tasks, other.tasks, strict=True):
        assert one.tokens == two.tokens
        assert two.entropy == pytest.approx(one.entropy, rel=1e-5)
        for load, again in zip(one.share, two.share, strict=True):
            assert again == pytest.approx(load, rel=1e-5)


def test_the_same_analysis_gives_the_same_record(record: ActivityRecord) -> None:
    assert analysed(model_of(), size=6) == record


def test_examples_tell_each_token_and_its_most_active_expert(record: ActivityRecord) -> None:
    model, tokenizer = model_of(), tiny_tokenizer()
    assert [example.task for example in record.examples] == ["arc_easy"] * 2 + ["openbookqa"] * 2
    assert record.shown == tuple(f"model.layers.{n}.mlp.down_proj" for n in range(2))
    items = subset_of(QUESTIONS, 6, 0)[1][:2]
    rows = encode_examples(tokenizer, get_task("arc_easy"), items, get_protocol("text"), 512)
    for row, example in zip(rows, record.examples[:2], strict=True):
        assert example.tokens == tuple(tokenizer.decode([token]) for token in row.input_ids)
        assert example.answer_length == row.answer_length
        for n, name in enumerate(record.shown):
            x = naive.inputs(model, [name], collate([row], 0))[name]
            p = [units[0] for units in naive.shares(model.get_submodule(name), x)]
            assert list(example.expert[n]) == [values.index(max(values)) for values in p]
            assert example.share[n] == pytest.approx([max(values) for values in p], rel=1e-5)


def test_fewer_items_than_asked_for_are_all_and_called_so() -> None:
    found = analysed(model_of(dtype="float32"), size=500, examples=0)
    assert [(task.subset, task.items) for task in found.tasks] == [("full", 10), ("full", 12)]
    assert found.examples == ()


def test_experts_without_an_update_have_no_similarity_and_the_sum_no_rank() -> None:
    model = furina.adapt(
        load_backbone("tiny-llama", "float32"), small("furina", start="zero_b"), seed=0
    )
    weights = analysed(model).weights
    assert set(weights.similarity) == {None} and set(weights.effective_rank or ()) == {0.0}


def test_experts_without_a_router_of_their_own_are_compared_all_the_same() -> None:
    found = analysed(model_of("mixlora", "float32"))
    assert {name.rpartition(".")[2] for name in found.linears} == {"gate_proj"}
    kinds = {name.rpartition(".")[2] for name in found.weights.linears}
    assert kinds == {"gate_proj", "up_proj", "down_proj"}
    assert found.shown == found.linears


def test_experts_may_differ_in_number_from_layer_to_layer() -> None:
    found = analysed(model_of("mola", "float32", allocation=(2, 5)))
    assert found.experts == (2,) * 7 + (5,) * 7
    assert found.tasks[0].top_k_share[:7] == pytest.approx([1.0] * 7)


def test_a_linear_of_an_unknown_method_takes_part_by_its_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is known of a method but what `MixtureLinear` asks for."""
    model = model_of("molora", "float32")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, MixtureLinear)

    def always_first(x: torch.Tensor) -> torch.Tensor:
        p = torch.zeros(len(x), 1, 3)
        p[..., 0] = 1
        return p

    monkeypatch.setattr(layer, "activity", always_first)
    found = analysed(model)
    assert found.experts[0] == 3 and found.tasks[0].first[0] == (1.0, 0.0, 0.0)
    assert found.tasks[0].entropy[0] == 0.0


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ({}, "no task to analyse"),
        ({"arc_easy": TaskItems("text", [])}, "no items of arc_easy"),
        ({"arc_esy": TaskItems("text", QUESTIONS)}, "Did you mean 'arc_easy'"),
        ({"arc_easy": TaskItems("txt", QUESTIONS)}, "Did you mean 'text'"),
        ({"arc_easy": TaskItems("cot", QUESTIONS)}, "Protocol cot cannot ask arc_easy"),
        ({"arc_easy": TaskItems("lm_eval", QUESTIONS)}, "only evaluates"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tasks: dict[str, TaskItems], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        analysed(model_of(dtype="float32"), tasks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of the tiny Llama, and questions of two tasks."""
    made = tmp_path_factory.mktemp("analysis")
    write_data(made / "data", splits=("test",))
    for method in ("furina", "lora"):
        furina.save(model_of(method, "float32"), made / method)
    return made


def call(folder: Path, out: Path, *words: str, method: str = "furina") -> int:
    command = ["analyse", str(folder / method), "--out", str(out), "--backbone", "tiny-llama"]
    command += ["--dtype", "float32", "--data-dir", str(folder / "data"), *words]
    return cli.main(command if "--task" in words else [*command, "--task", "arc_easy"])


def test_the_command_writes_the_record_and_its_maps_and_prints_the_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "activity.json"
    words = ["--task", "arc_easy", "openbookqa", "--items", "5", "--examples", "1", "--row", "ours"]
    assert call(folder, out, *words) == 0
    shown = capsys.readouterr().out
    record = ActivityRecord.read(out)
    assert (record.row, record.method) == ("ours", "furina")
    assert [task.items for task in record.tasks] == [5, 5] and len(record.examples) == 2
    assert record.backbone.sha256 == backbone_hash(load_backbone("tiny-llama", "float32"))
    assert record.dtype == "float32"
    mean = sum(record.tasks[0].top_k_share) / len(record.linears)
    assert f"{100 * mean:.1f}" in shown and "openbookqa" in shown
    maps = sorted(path.name for path in (tmp_path / "activity-maps").iterdir())
    assert [name.split("--")[0] for name in maps] == [
        *("activity-load", "activity-share", "activity-tasks", "activity-tokens")
    ]
    assert str(out) in shown and str(tmp_path / "activity-maps") in shown
    again = tmp_path / "again.json"
    command = json.loads(out.read_text())["command"].split()
    assert command[:2] == ["furina", "analyse"]
    command[-1] = str(again)
    assert cli.main([*command[1:], "--data-dir", str(folder / "data")]) == 0
    assert replace(ActivityRecord.read(again), command=record.command) == record


@pytest.mark.parametrize(
    ("method", "words", "said"),
    [
        ("lora", [], "This lora adapter has no experts to select from"),
        ("absent", [], "is not a furina adapter folder"),
        ("furina", ["--task", "arc_esy"], "Did you mean 'arc_easy'"),
        ("furina", ["--protocol", "cot"], "Protocol cot cannot ask arc_easy"),
        ("furina", ["--items", "0"], "--items must be a whole number of at least 1, not '0'"),
        (
            "furina",
            ["--examples", "-1"],
            "--examples must be a whole number of at least 0, not '-1'",
        ),
        ("furina", ["--items", "few"], "--items must be a whole number"),
        (
            "furina",
            ["--batch-size", "0"],
            "--batch-size must be a whole number of at least 1, not '0'",
        ),
        ("furina", ["--backbone", "tiny-qwen2"], "trained on other weights"),
    ],
)
def test_wrong_input_is_one_sentence(
    method: str,
    words: list[str],
    said: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(folder, tmp_path / "out.json", *words, method=method) == 2
    message = capsys.readouterr().err
    assert said in message and len(message.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_token_that_the_model_has_no_embedding_for_is_one_sentence() -> None:
    model = model_of()
    model.resize_token_embeddings(100)
    with pytest.raises(ConfigurationError, match=r"is number \d+, and the model has 100 embedd"):
        analysed(model)


def test_a_record_is_never_overwritten(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "record.json"
    precious.write_text("mine")
    assert call(folder, precious) == 2
    assert "exists already: name a new file" in capsys.readouterr().err
    assert precious.read_text() == "mine"
