"""A run of several processes leaves the folder that one process leaves, and the same numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from furina import adapter_state_dict, merge
from furina.errors import ConfigurationError, FurinaError
from furina.experiment import fit as fit_module
from furina.experiment.config import RunConfig
from furina.experiment.fit import Fitted, fit
from furina.experiment.measures import one_device
from furina.experiment.process import run_data
from furina.experiment.processes import launch as launch_module
from furina.records import Training
from tests.experiment.helpers import tiny
from tests.training.ranks import as_rank, on_two_ranks

ROOT = Path(__file__).parents[2]
EXACT = {"rank": 2, "num_experts": 4, "dropout": 0.0}


def config(data_dir: str, devices: int, **changes: Any) -> RunConfig:
    """Return a run whose micro-batches, over all devices, are whole batches of four.

    A gradient, whose norm is clipped to 1, is off by δ = 2⁻²⁴. Where it is no larger than that,
    Adam moves the entry either way by lr·m, m = 20 at most, so that N = 2·10⁴ entries change the
    loss of about 6 by 2·N·δ·lr·m in each of six steps: by 4·10⁻⁶ of it at the learning rate below.
    """
    size = 4 // devices
    odd = {"validation_interval": 3, "validation_size": 5}  # which two processes cannot halve
    settings = {"adapter": EXACT, "learning_rate": 1e-4, "micro_batch_size": size, **odd, **changes}
    return tiny(data_dir, devices=devices, **settings)


@pytest.fixture(scope="module")
def alone(data_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fit(config(data_dir, 1), tmp_path_factory.mktemp("alone"))


def assert_equal(ours: Training, theirs: Training) -> None:
    for name in ("loss_curve", "validation_curve"):
        steps, losses = zip(*getattr(ours, name), strict=True)
        other_steps, other_losses = zip(*getattr(theirs, name), strict=True)
        assert steps == other_steps
        assert losses == pytest.approx(other_losses, rel=1e-5), name
    assert ours.steps == theirs.steps
    assert ours.selection == pytest.approx(theirs.selection, rel=1e-4)
    # Measured in micro-batches of the size that each device had.
    assert ours.gradient_ratio == pytest.approx(theirs.gradient_ratio, rel=0.2)
    assert (ours.trainable, ours.total) == (theirs.trainable, theirs.total)


def assert_whole_folder(run_dir: Path) -> None:
    assert {path.name for path in run_dir.iterdir()} == {
        *("adapter", "training.json", "config.json", "logs")
    }
    rows = (run_dir / "logs" / "metrics.csv").read_text().splitlines()
    assert len(rows) > 6 and "train/loss" in rows[0]


@pytest.mark.slow  # tests/training/test_fsdp.py and test_ddp.py kill runs, too
def test_a_sharded_run_that_lost_a_process_goes_on_to_what_one_process_trains(
    data_dir: str, alone: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "WORKER", "tests.experiment.dying_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DIE_AFTER", "3")
    sharded = config(data_dir, 2, strategy="fsdp")
    with pytest.raises(FurinaError, match="Training process 1 was ended by SIGKILL"):
        fit(sharded, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "last.ckpt", "logs"}
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 2

    monkeypatch.delenv("DIE_AFTER")
    fitted = fit(sharded, tmp_path)
    assert_whole_folder(tmp_path)
    assert_equal(fitted.training, alone.training)
    own = load_file(tmp_path / "adapter" / "furina_adapter.safetensors")
    for name, tensor in adapter_state_dict(alone.model).items():
        # Not entry by entry: of a gradient that is no more than rounding Adam makes a whole step.
        apart = (own[name] - tensor).norm() / tensor.norm()
        assert apart < 1e-3, name
    assert merge(fitted.model).num_merged == 14


def test_the_gradient_ratio_takes_no_more_rows_at_once_than_a_device_had(data_dir: str) -> None:
    shared = config(data_dir, 2, micro_batch_size=None)
    data = run_data(shared)
    data.setup("fit")
    window = one_device(shared, data).window(0)
    assert [len(batch["input_ids"]) for batch in window] == [2, 2]


def fit_as_one_of_two(rank: int, port: int, folder: Path, settings: dict[str, Any]) -> None:
    as_rank(rank, port)
    save = fit_module.save

    def noted(*arguments: Any) -> None:
        (folder / f"saved{rank}").touch()
        save(*arguments)

    fit_module.save = noted
    fitted = fit(RunConfig().updated(settings), folder / "run")
    assert fitted.model.device.type == "cpu"
    torch.save(adapter_state_dict(fitted.model), folder / f"adapter{rank}.pt")
    with pytest.raises(ConfigurationError, match="started 2 processes for 4 devices"):
        fit(RunConfig().updated({**settings, "devices": 4}), folder / "other")


def test_processes_that_torchrun_has_started_each_get_the_fitted_model(
    data_dir: str, alone: Fitted, tmp_path: Path
) -> None:
    shared = config(data_dir, 2)
    assert on_two_ranks(fit_as_one_of_two, tmp_path, shared.to_dict()) == [0, 0]
    assert_whole_folder(tmp_path / "run")
    assert_equal(fit(shared, tmp_path / "run").training, alone.training)
    first, second = (torch.load(tmp_path / f"adapter{rank}.pt") for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert not (tmp_path / "other").exists()
    assert [path.name for path in tmp_path.glob("saved*")] == ["saved0"]


def diverge(rank: int, port: int, folder: Path, settings: dict[str, Any]) -> None:
    from furina.training import DivergedError

    as_rank(rank, port)
    with pytest.raises(DivergedError):
        fit(RunConfig().updated(settings), folder / "run")
    (folder / f"diverged{rank}").write_text(os.environ["RANK"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_notice_that_a_run_diverges(
    strategy: str, data_dir: str, tmp_path: Path
) -> None:
    wild = tiny(data_dir, "lora", devices=2, strategy=strategy, learning_rate=1e30, warmup_steps=0)
    assert on_two_ranks(diverge, tmp_path, wild.to_dict()) == [0, 0]
    assert (tmp_path / "diverged0").exists() and (tmp_path / "diverged1").exists()
    assert not (tmp_path / "run" / "adapter").exists()
