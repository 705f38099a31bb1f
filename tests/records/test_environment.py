from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from furina import records
from furina.records import environment as module
from furina.records.environment import git_state

QUIET = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *QUIET, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("furina/__init__.py", "README.md", "results/quickstart/run.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


def test_a_clean_checkout_gives_its_commit(checkout: Path) -> None:
    assert git_state(checkout) == (git(checkout, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize("name", ["README.md", "results/quickstart/run.json", "results/new.json"])
def test_what_a_run_or_its_report_writes_does_not_make_a_checkout_dirty(
    name: str, checkout: Path
) -> None:
    (checkout / name).write_text("changed")
    assert git_state(checkout)[1] is False


@pytest.mark.parametrize("name", ["furina/__init__.py", "furina/new.py", "docs/README.md"])
def test_any_other_change_makes_a_checkout_dirty(name: str, checkout: Path) -> None:
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text("changed")
    assert git_state(checkout)[1] is True


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert git_state(tmp_path) == (None, None)


def test_a_package_installed_inside_another_checkout_does_not_take_its_commit(
    checkout: Path,
) -> None:
    installed = checkout / ".venv" / "site-packages"
    (installed / "furina").mkdir(parents=True)
    (installed / "furina" / "__init__.py").write_text("")
    (checkout / ".gitignore").write_text(".venv\n")
    assert git_state(installed) == (None, None)


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) == (None, None)


def test_provenance_names_python_packages_and_machine() -> None:
    import torch

    found = records.provenance()
    assert found.python == sys.version.split()[0]
    assert found.packages["torch"] == torch.__version__
    assert found.packages.keys() >= {"lightning", "transformers", "lm_eval", "numpy"}
    assert found.hardware.threads == torch.get_num_threads()
    assert found.hardware.cpu
    assert found.hardware.cores >= 1
    assert found.hardware.memory_bytes > 2**28


def test_the_packages_of_provenance_are_requirements() -> None:
    import tomllib

    project = Path(__file__).parents[2] / "pyproject.toml"
    requirements = tomllib.loads(project.read_text())["project"]["dependencies"]
    indirect = {"furina", "tokenizers"}
    for name in set(module.PACKAGES) - indirect:
        assert any(line.replace("-", "_").startswith(name) for line in requirements), name


def test_timestamps_are_utc_and_sortable() -> None:
    first, second = records.timestamp(), records.timestamp()
    assert first.endswith("+00:00")
    assert first <= second


PEAK = """
from furina.records import peak_memory_bytes, reset_peak_memory
before = peak_memory_bytes()
block = b"x" * 200_000_000
grown = peak_memory_bytes()
del block
kept = peak_memory_bytes()
print(before, grown, kept, reset_peak_memory(), peak_memory_bytes())
"""


def test_peak_memory_is_in_bytes_outlives_the_block_and_can_be_reset() -> None:
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    before, grown, kept, reset, after = run.stdout.split()
    assert 190_000_000 < int(grown) - int(before) < 260_000_000
    assert int(kept) > int(grown) - 10_000_000
    assert (int(after) < int(grown) - 150_000_000) == (reset == "True")


def test_peak_memory_falls_back_to_the_resource_module(monkeypatch: pytest.MonkeyPatch) -> None:
    by_status = records.peak_memory_bytes()
    monkeypatch.setattr(module, "Path", lambda name: Path("/does/not/exist"))
    assert records.peak_memory_bytes() == pytest.approx(by_status, rel=0.2)
