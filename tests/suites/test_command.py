"""`furina run` by hand: a dry run, and Slurm's script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from furina.cli import main
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
