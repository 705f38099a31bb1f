from __future__ import annotations

from pathlib import Path

import pytest

from tests.records import fakes


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A results folder with one suite of one seed."""
    fakes.write_suite(tmp_path / "results" / "quickstart")
    return tmp_path / "results"


@pytest.fixture
def folder(results: Path) -> Path:
    return results / "quickstart"


@pytest.fixture
def seeded(tmp_path: Path) -> Path:
    """A suite of three seeds."""
    fakes.write_suite(tmp_path / "seeded", seeds=(0, 1, 2))
    return tmp_path / "seeded"
