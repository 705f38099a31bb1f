"""Trials score questions held out of train, and say so in their records."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from furina.adapters.furina import FurinaConfig
from furina.errors import ConfigurationError
from furina.evaluation.evaluate import evaluate
from furina.experiment.trials import search_trial, selection_trial
from tests.experiment.conftest import Finished
from tests.experiment.helpers import tiny, write_data


@pytest.fixture
def train_only(tmp_path: Path) -> str:
    """Data without a test split: reading it would be an error."""
    return write_data(tmp_path / "train-only", splits=("train",))


@pytest.fixture
def run_dir(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.run_dir, tmp_path / "run"))


def test_a_search_trial_scores_the_held_out_questions(finished: Finished, run_dir: Path) -> None:
    record = search_trial(finished.config, run_dir, "command")
    fitted = finished.fitted
    score = evaluate(
        fitted.model,
        fitted.tokenizer,
        "arc_easy",
        fitted.data.validation_items["arc_easy"],
        batch_size=8,
    ).scores["acc"]
    assert (record.value, record.stderr, record.n) == (score.value, score.stderr, 4)
    assert record.split == "train-held-out"
    assert (record.method, record.learning_rate, record.steps) == ("furina", 0.01, 6)
    assert record.seconds == fitted.training.seconds


def test_the_default_multiplier_is_recorded(finished: Finished, run_dir: Path) -> None:
    assert "magnitude_lr_multiplier" not in finished.config.adapter
    record = search_trial(finished.config, run_dir, "command")
    assert record.magnitude_multiplier == FurinaConfig().magnitude_lr_multiplier


def test_the_base_is_searched_without_training_or_test_rows(
    train_only: str, tmp_path: Path
) -> None:
    record = search_trial(tiny(train_only, "base"), tmp_path / "run", "command")
    assert record.value is not None and record.magnitude_multiplier is None
    assert (record.steps, record.learning_rate, record.seconds) == (0, 0.0, 0.0)


def test_a_diverged_trial_has_no_score(train_only: str, tmp_path: Path) -> None:
    config = tiny(train_only, "lora", learning_rate=1e30, warmup_steps=0)
    record = search_trial(config, tmp_path / "run", "command")
    assert (record.value, record.stderr) == (None, None)


def test_a_selection_trial_records_the_options_in_force(finished: Finished, run_dir: Path) -> None:
    record = selection_trial(finished.config, run_dir, "command")
    training = finished.fitted.training
    assert training.selection is not None
    assert record.top_k_share == training.selection["top_k_share"]
    assert (record.final_loss, record.gradient_ratio) == (
        training.final_loss,
        training.gradient_ratio,
    )
    # None of these is in the config: they are the method's defaults.
    assert (record.coefficient, record.reduction, record.top_k) == (0.01, "sum", 2)


@pytest.mark.parametrize(
    ("method", "held_out", "said"),
    [
        ("lora", 4, "no selection loss to study"),
        ("furina", 0, "no expert selection to measure"),
    ],
)
def test_nothing_to_measure_is_one_sentence_before_training(
    data_dir: str, tmp_path: Path, method: str, held_out: int, said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        selection_trial(tiny(data_dir, method, validation_size=held_out), tmp_path, "command")
    assert list(tmp_path.iterdir()) == []
