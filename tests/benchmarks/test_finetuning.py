"""benchmarks/training/finetuning.py: both loops train the same, and it writes what it measured."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import furina
from benchmarks.training import finetuning, finetuning_page
from tests.benchmarks.helpers import written
from tests.experiment.helpers import write_data

SMALL = ["--backbone", "tiny-llama", "--dtype", "float32", "--rank", "8", "--experts", "4"]
SMALL += ["--steps", "4", "--batch-size", "4", "--bucket-steps", "4", "--warmup-steps", "2"]
SMALL += ["--learning-rate", "0.01", "--rounds", "1", "--threads", "1"]


@pytest.fixture(scope="module", autouse=True)
def questions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made-up questions in place of fetched ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FURINA_DATA_DIR", write_data(tmp_path_factory.mktemp("data")))
        # In a test session's large heap it would take longer than a tiny model's arm.
        patch.setattr("gc.collect", lambda: 0)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()) as written:
        finetuning.main([*SMALL, "--results", str(folder)])
    made: dict[str, Any] = json.loads(written.getvalue().splitlines()[-1])
    return made


@contextlib.contextmanager
def embedded_ids() -> Iterator[list[Tensor]]:
    """Yield a list that gets the ids of every batch that a model embeds."""
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            seen.append(inputs[0].clone())

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield seen
    finally:
        handle.remove()


def rows(batches: list[Tensor]) -> list[list[list[int]]]:
    """Return each batch's rows without padding, which has id 0."""
    return [[[i for i in row if i] for row in batch.tolist()] for batch in batches]


def same_start(peft_model: Any, options: Any) -> Any:
    """Return `peft_model` with A of furina's LoRA of the same seed; B is zero in both."""

    def made(peer: str, model: nn.Module, chosen: Any) -> nn.Module:
        twin = furina.load_backbone(options.backbone, options.dtype)
        furina.adapt(twin, "lora", seed=chosen.seed, rank=options.rank)
        start = furina.adapter_parameters(twin)
        built: nn.Module = peft_model(peer, model, chosen)
        for name, parameter in built.named_parameters():
            if "lora_A" in name:
                own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
                parameter.data.copy_(start[own])
        return built

    return made


def test_the_last_line_is_what_the_files_hold(report: dict[str, Any], folder: Path) -> None:
    page = finetuning_page.page(report).markdown("finetuning")
    assert written(folder / "finetuning") == (report, page)
    assert "<svg" in (folder / "finetuning.svg").read_text()
    assert report["command"].startswith(
        "python -m benchmarks.training.finetuning --backbone tiny-llama"
    )
    assert report["environment"]["packages"].keys() >= {"torch", "peft", "transformers"}
    assert list(report["ratios"]) == [
        *("end_to_end/lora/plain", "end_to_end/lora_bucketed/plain"),
        *("end_to_end/furina/plain", "end_to_end/plain_again/plain"),
    ]
    assert list(report["loss_differences"]) == [
        *("loss/lora_minus_plain", "loss/plain_again_minus_plain"),
    ]


def test_every_arm_is_timed_on_as_many_tokens_and_parameters(report: dict[str, Any]) -> None:
    (single,) = report["rounds"]
    arms = single["arms"]
    assert set(arms) == set(finetuning.ARMS)
    # One bucket holds all steps' rows, so that only their order differs.
    assert len({arm["tokens"] for arm in arms.values()}) == 1
    loras = [arm["trainable"] for name, arm in arms.items() if name != finetuning.FURINA]
    assert len(set(loras)) == 1
    for name, arm in arms.items():
        assert arm["tokens"] <= arm["positions"]
        assert 0 < arm["seconds"] < arm["wall_seconds"]
        speed = report["tokens_per_second"][name]["median"]
        assert speed == pytest.approx(arm["tokens"] / arm["seconds"])
        assert [len(curve) for curve in report["losses"][name]] == [4]
    assert arms[finetuning.BUCKETED]["positions"] <= arms[finetuning_page.LORA]["positions"]


def test_the_first_loss_does_not_depend_on_the_adapter(report: dict[str, Any]) -> None:
    first = {name: curves[0][0] for name, curves in report["losses"].items()}
    plain, again, lora, bucketed, furina_ = (first[name] for name in finetuning.ARMS)
    assert [again, lora] == pytest.approx([plain] * 2, rel=1e-6)
    assert furina_ == pytest.approx(bucketed, rel=1e-6)  # without the selection loss
    noise = report["loss_differences"]["loss/plain_again_minus_plain"]
    assert noise["max_abs"] > 1e-4  # it did start from another adapter


def test_from_one_start_both_loops_train_the_same_rows_to_the_same_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = finetuning.parse(SMALL)
    monkeypatch.setattr(finetuning, "peft_model", same_start(finetuning.peft_model, options))
    with embedded_ids() as theirs:
        plain = finetuning.run_arm(finetuning.PLAIN, options, 1)
    with embedded_ids() as ours:
        lora = finetuning.run_arm(finetuning_page.LORA, options, 1)
    assert rows(theirs) == rows(ours)
    assert [ids.shape[1] for ids in theirs] == [max(map(len, step)) for step in rows(theirs)]
    assert plain.tokens == lora.tokens == sum(len(row) for step in rows(ours) for row in step)
    assert plain.positions == sum(ids.numel() for ids in theirs)
    assert lora.positions == sum(ids.numel() for ids in ours)
    # The same schedule, clipping, scale and optimiser, or this would not hold. A gradient of norm 1
    # is off by δ = 2⁻²⁴, and where it is no larger Adam goes a step either way: N entries change
    # the loss of about 6 by 2·N·δ·lr in each step, in all by 2e-5 of it for N = 2e4.
    assert lora.losses == pytest.approx(plain.losses, rel=1e-4)
    assert len({round(loss, 3) for loss in lora.losses}) == 4


def test_a_round_has_one_order_of_questions_and_no_adapter_starts_twice_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finetuning, "ours", lambda config: (config.seed, config.steps))
    monkeypatch.setattr(
        finetuning, "plain", lambda config, seed, _: (config.seed, config.steps, seed)
    )
    options = finetuning.parse([*SMALL, "--rounds", "2", "--seed", "7"])
    told = {n: [finetuning.run_arm(name, options, n) for name in finetuning.ARMS] for n in range(3)}
    assert [{arm[0] for arm in arms} for arms in told.values()] == [{7}, {8}, {9}]
    assert [{arm[1] for arm in arms} for arms in told.values()] == [{1}, {4}, {4}]
    assert [told[n][i][2] for i in (0, 1) for n in range(3)] == [7, 8, 9, 10, 11, 12]


def test_steps_are_timed_to_the_last_update_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(finetuning.time, "perf_counter", lambda: next(clock))
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with finetuning.step_times(2) as times:
        for _ in range(2):
            model(model(torch.ones(2))).sum().backward()
            optimizer.step()
    model(torch.ones(2))
    optimizer.step()
    assert times == [0, 1, 2]
    with pytest.raises(AssertionError, match="not every step"), finetuning.step_times(2):
        optimizer.step()


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    def outcome(seconds: float, loss: float) -> Any:
        return finetuning.Outcome(seconds, 2 * seconds, 10, 12, 5, [loss])

    seconds = [(2.0, 4.0), (8.0, 8.0), (9.0, 3.0)]  # 1/2, 1 and 3; of the medians it is 2
    rounds = {
        name: [
            outcome(ours if name == finetuning_page.LORA else plain, 1.0) for plain, ours in seconds
        ]
        for name in finetuning.ARMS
    }
    report = finetuning.report_of(rounds, finetuning.parse([*SMALL, "--rounds", "3"]), "command")
    assert report["ratios"]["end_to_end/lora/plain"] == 1.0
    assert report["tokens_per_second"][finetuning_page.LORA]["median"] == 2.5
    assert [list(each["arms"]) for each in report["rounds"]] == [list(finetuning.ARMS)] * 3
    page = finetuning_page.page(report).markdown("finetuning")
    (row,) = (line for line in page.splitlines() if "/lora |" in line)
    assert "| 2 | 2 to 3 | 1.00 | 16.7% | 8.0 |" in row


def test_differences_are_of_all_steps_of_all_rounds() -> None:
    found = finetuning.apart([[1.0, 2.0], [3.0, 4.0]], [[1.0, 4.0], [2.0, 4.0]])
    assert found == {"mean": -0.25, "max_abs": 2.0}
    with pytest.raises(ValueError):
        finetuning.apart([[1.0, 2.0]], [[1.0]])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--task", "openbokqa"], "Did you mean 'openbookqa'?"),
        (["--backbone", "tiny-lama"], "tiny-llama"),
        (["--dtype", "bfloat15"], "dtype"),
        (["--rank", "6"], "--experts must divide --rank"),
        (["--rounds", "0"], "at least 1"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--batch-size", "400"], "more than the 30 train questions"),
        (["--dropout", "2"], "dropout=2.0"),
        (["--learning-rate", "-1"], "--learning-rate must be positive"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_sentence(
    wrong: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        finetuning.main([*SMALL, *wrong])
    told = caught.value.code
    sentence = told if isinstance(told, str) else capsys.readouterr().err.splitlines()[-1]
    assert told != 0 and words in sentence and "error: " in sentence and "\n" not in sentence
