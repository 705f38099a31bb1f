"""Epochs are as many optimiser steps as train that many rows, rests of a pass included."""

from __future__ import annotations

from pathlib import Path

import pytest

from furina.experiment.config import RunConfig
from furina.experiment.fit import fit
from furina.experiment.measures import RATIO_WINDOWS
from furina.experiment.process import optimiser_steps, run_data
from furina.training import gradient_ratio
from tests.experiment.helpers import SIZES, tiny

ROWS = SIZES["train"] - 4  # held out


def steps(config: RunConfig) -> int:
    data = run_data(config)
    data.setup("fit")
    return optimiser_steps(config, data)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "expected"),
    [(1, 13, 2), (1, 26, 1), (1, 4, 7), (2, 4, 13), (3, 4, 20), (3, 25, 4), (1, 1, 26)],
)
def test_epochs_are_rounded_up_to_whole_steps(
    data_dir: str, epochs: int, batch_size: int, expected: int
) -> None:
    config = tiny(data_dir, steps=None, epochs=epochs, batch_size=batch_size)
    assert steps(config) == expected
    trained = expected * batch_size
    assert epochs * ROWS <= trained < epochs * ROWS + batch_size


def test_steps_are_taken_as_they_are(data_dir: str) -> None:
    assert steps(tiny(data_dir, steps=5)) == 5


def test_a_mixture_counts_the_rows_that_its_weights_and_caps_leave(data_dir: str) -> None:
    mixture = {"arc_easy": {"cap": 10}, "openbookqa": {"weight": 0.5}}
    config = tiny(data_dir, "lora", steps=None, epochs=2, task="both", mixture=mixture)
    data = run_data(config)
    data.setup("fit")
    rows = len(data.train_dataloader().examples)
    assert rows == 10 + (SIZES["train"] - 2) // 2
    assert optimiser_steps(config, data) == -(-2 * rows // config.batch_size)


def test_an_epoch_decides_steps_schedule_validation_and_ratio_windows(
    data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows: list[int] = []

    def counted(*arguments: object) -> dict[str, float | None]:
        windows.append(1)
        return gradient_ratio(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("furina.experiment.measures.gradient_ratio", counted)
    config = tiny(data_dir, steps=None, epochs=1, batch_size=8, micro_batch_size=8)
    by_epochs = fit(config, tmp_path / "epochs").training
    by_steps = fit(config.updated({"steps": 4, "epochs": None}), tmp_path / "steps").training
    assert by_epochs.steps == 4 and [step for step, _ in by_epochs.loss_curve] == [1, 2, 3, 4]
    assert [step for step, _ in by_epochs.validation_curve] == [4]
    assert len(windows) == 2 * RATIO_WINDOWS
    assert by_epochs.loss_curve == by_steps.loss_curve  # the schedule ends where it should
    assert by_epochs.gradient_ratio == by_steps.gradient_ratio
