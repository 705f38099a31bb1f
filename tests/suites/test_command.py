"""`furina run` by hand: a dry run, and Slurm's script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from furina.cli import main
from furina.experiment.config import RunConfig
from tests.experiment.helpers import SMALL, write_data
from tests.suites.helpers import lora, write_suite


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shared = {**SMALL, "data_dir": write_data(tmp_path / "data")}
    return write_suite(tmp_path / "own", shared, base={"method": "base"}, lora=lora())


def test_a_dry_run_lists_the_runs_and_what_they_come_to_and_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", str(folder), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "own: base on arc_easy, seed 0, tiny-llama" in said
    assert "own: lora on arc_easy, seed 0, tiny-llama" in said
    assert "Plan of 2 cells" in said and "memory" in said and "hours" in said
    assert "#SBATCH" not in said
    assert "< 0.001" in said and not re.search(r"\de-\d", said)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_for_slurm_prints_its_script(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--dry-run", "--cluster", "slurm", "--slurm.partition", "gpu", "--jobs", "2"]
    assert main(["run", str(folder), *words]) == 0
    said = capsys.readouterr().out
    assert "#SBATCH --partition=gpu" in said and "#SBATCH --array=0-1%2" in said


def test_the_resolved_runs_are_shown_with_what_gives_each_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scale = {"steps": 9, "warmup_steps": 2, "by_task": {"boolq": {"batch_size": 3}}}
    (tmp_path / "scales.yaml").write_text(yaml.safe_dump({"cpu": scale}))
    shared = {"warmup_steps": 1, "cpu": {"test_seed": 7, "sweep": {"task": ["boolq"]}}}
    narrow = lora(adapter={"rank": 2, "alpha": 4.0}, sweep={"learning_rate": [0.1]})
    write_suite(tmp_path / "own", shared, narrow=narrow)
    write_suite(tmp_path / "new", shared, wide={"like": "own/narrow", "adapter": {"rank": 8}})
    assert main(["run", "new", "--rows", "wide", "--seeds", "2", "--show-config"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("# wide on boolq, seed 0\n")
    assert yaml.safe_load(second)["seed"] == 1
    made = yaml.safe_load(first)
    assert RunConfig().updated(made).to_dict() == made
    pairs = (line.rsplit("  # ", 1) for line in first.splitlines() if "  # " in line)
    assert {text.strip(): origin for text, origin in pairs}.items() >= {
        ("suite: new-cpu", "the suite's name"),
        ("row: wide", "the file's name"),
        ("method: lora", "own/narrow.yaml"),
        ("rank: 8", "new/wide.yaml"),
        ("alpha: 4.0", "own/narrow.yaml"),
        ("dropout: 0.05", "default of lora"),
        ("task: boolq", "new/defaults.yaml, cpu, sweep"),
        ("steps: 9", "scales.yaml, cpu"),
        ("warmup_steps: 1", "new/defaults.yaml"),
        ("batch_size: 3", "scales.yaml, cpu, by_task"),
        ("learning_rate: 0.1", "own/narrow.yaml, sweep"),
        ("seed: 0", "--seeds"),
        ("test_seed: 7", "new/defaults.yaml, cpu"),
        ("max_length: 512", "default"),
    }
    assert not (tmp_path / "results").exists() and not (tmp_path / "runs").exists()
