"""tests/processors.py: every level runs, and one that fails or cannot be set is named."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import processors
from tests.processors import LEVELS, NUMERIC


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine that shows each level, and whose tests pass."""
    state = SimpleNamespace(shown={"avx2": "AVX2", "default": "DEFAULT"}, fails="never", runs=[])

    def run(command: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        level = env.get("ATEN_CPU_CAPABILITY", "native")
        if "pytest" not in command:
            return SimpleNamespace(stdout=state.shown.get(level, "AVX512").encode())
        state.runs.append((level, command))
        return SimpleNamespace(returncode=int(level == state.fails))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # of the shell, and no business of native's
    return state


def test_every_level_runs_every_numeric_test(machine: SimpleNamespace) -> None:
    processors.main(["-x"])
    assert [level for level, _ in machine.runs] == ["native", "avx2", "default"]
    assert all(command[-len(NUMERIC) - 1 :] == [*NUMERIC, "-x"] for _, command in machine.runs)
    assert all((Path(__file__).parents[1] / path).exists() for path in NUMERIC)


def test_a_level_that_fails_is_named_and_the_others_run(machine: SimpleNamespace) -> None:
    machine.fails = "avx2"
    with pytest.raises(SystemExit, match=r"^error: .* failed at level avx2$"):
        processors.main([])
    assert len(machine.runs) == len(LEVELS)


def test_a_level_that_cannot_be_set_fails(machine: SimpleNamespace) -> None:
    machine.shown = {}
    with pytest.raises(
        SystemExit, match=r"avx2 \(PyTorch calls this .* AVX512 and not AVX2\), old"
    ):
        processors.main([])
