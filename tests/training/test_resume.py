from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import furina
from furina.errors import ConfigurationError
from furina.training import FinetuneModule, LossHistory, ResumeCheckpoint
from tests.training import killed_run
from tests.training.helpers import PROCESSES, RandomQuestions, fit, tiny

# Epochs are 5 steps long, checkpoints come every 3 steps, validation every 4.
DEATHS = [
    ("step", 3),  # mid-epoch
    ("window", random.Random(5).randrange(4, 6)),  # second micro-batch of a step
    ("half", 1),  # while step 6's checkpoint is being written
    ("unrenamed", 2),  # while step 9's is, after step 6's succeeded
    ("step", 11),  # first step of an epoch
    ("validation", 12),  # which comes before that step's checkpoint
    ("window", random.Random(6).randrange(13, 16)),
]


def run_in_child(folder: Path, moment: str | None = None, step: int = 0) -> int:
    child = PROCESSES.Process(target=killed_run.run, args=(folder, moment, step), daemon=True)
    child.start()
    child.join(600)
    assert child.exitcode is not None
    return child.exitcode


def printed_losses(folder: Path) -> list[tuple[int, str]]:
    lines = (folder / "losses.txt").read_text().splitlines()
    return [(int(step), loss) for step, loss in (line.split() for line in lines)]


def test_run_killed_seven_times_is_bitwise_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    assert run_in_child(whole) == 0
    for moment, step in DEATHS:
        assert run_in_child(killed, moment, step) == -signal.SIGKILL, (moment, step)
    assert run_in_child(killed) == 0

    expected = dict(printed_losses(whole))
    assert list(expected) == list(range(1, killed_run.STEPS + 1))
    redone = printed_losses(killed)
    assert len(redone) > len(expected)
    assert {step for step, _ in redone} == set(expected)
    for step, loss in redone:
        assert loss == expected[step], step
    final = [torch.load(folder / "final.pt") for folder in (whole, killed)]
    assert final[0]["training"] == final[1]["training"]
    assert final[0]["auxiliary"] == final[1]["auxiliary"]
    assert final[0]["validation"] == final[1]["validation"]
    assert [step for step, _ in final[0]["validation"]] == [4, 8, 12, 16]
    for name, tensor in final[0]["adapter"].items():
        assert torch.equal(tensor, final[1]["adapter"][name]), name
    assert sorted(path.name for path in killed.iterdir()) == ["final.pt", "last.ckpt", "losses.txt"]


def interrupted(folder: Path, stop: int, **options: Any) -> tuple[LossHistory, Any]:
    """Train to `stop`, then in a new trainer to the end."""
    for steps in (stop, None):
        resume, history = ResumeCheckpoint(folder / "last.ckpt", 100), LossHistory()
        module = FinetuneModule(tiny(dropout=0.1), 1e-2, total_steps=15)
        limits = {"max_steps": steps} if steps else options
        run = fit(
            module,
            folder,
            callbacks=[history, resume],
            ckpt_path=resume.latest(),
            limit_val_batches=1.0,
            **limits,
        )
    return history, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[LossHistory, Any]:
    """The run of 15 steps that nothing interrupts."""
    history = LossHistory()
    module = FinetuneModule(tiny(dropout=0.1), 1e-2, total_steps=15)
    folder = tmp_path_factory.mktemp("whole")
    return history, fit(module, folder, callbacks=[history], limit_val_batches=1.0, max_steps=15)


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 15}])
@pytest.mark.parametrize("stop", [4, 5, 6, 10, 15])
def test_resume_at_and_around_an_epoch_end_continues_exactly(
    stop: int, limit: dict[str, int], whole: tuple[LossHistory, Any], tmp_path: Path
) -> None:
    history, run = interrupted(tmp_path, stop, **limit)
    assert run.global_step == 15
    assert history.training == whole[0].training
    state = furina.adapter_state_dict(run.lightning_module.model)
    for name, tensor in furina.adapter_state_dict(whole[1].lightning_module.model).items():
        assert torch.equal(tensor, state[name]), name


def test_running_loss_goes_on_over_a_resume(whole: tuple[LossHistory, Any], tmp_path: Path) -> None:
    _, run = interrupted(tmp_path, 7, max_steps=15)
    key = "train/loss_running"
    assert torch.equal(run.callback_metrics[key], whole[1].callback_metrics[key])


def resume(module: FinetuneModule, folder: Path) -> None:
    fit(
        module,
        folder,
        RandomQuestions(),
        max_steps=4,
        callbacks=[ResumeCheckpoint(folder / "last.ckpt", 2)],
        ckpt_path=folder / "last.ckpt",
    )


@pytest.mark.parametrize(
    ("model", "settings", "difference"),
    [
        ({"method": "lora"}, {}, "another adapter, with method='furina' and not 'lora'"),
        ({"dropout": 0.5}, {}, r"another adapter, with dropout=0\.0 and not 0\.5"),
        ({}, {"learning_rate": 1e-2}, r"another run, with learning_rate=0\.001 and not 0\.01"),
        ({}, {"seed": 1}, "another run, with seed=0 and not 1"),
    ],
)
def test_resuming_with_anything_changed_is_an_error_that_names_it(
    model: dict[str, Any], settings: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    common: dict[str, Any] = {"learning_rate": 1e-3, "total_steps": 4}
    first = FinetuneModule(tiny(), **common)
    fit(
        first,
        tmp_path,
        max_steps=2,
        callbacks=[ResumeCheckpoint(tmp_path / "last.ckpt", 2)],
    )
    with pytest.raises(ConfigurationError, match=difference):
        resume(FinetuneModule(tiny(**model), **{**common, **settings}), tmp_path)
