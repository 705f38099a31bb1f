"""One data folder and one fine-tuned run for all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from furina.experiment.config import RunConfig
from furina.experiment.fit import Fitted, fit
from tests.experiment.helpers import tiny, write_data


class Finished(NamedTuple):
    config: RunConfig
    run_dir: Path
    fitted: Fitted


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def finished(data_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A FURINA run with dropout, accumulation and validations between its checkpoints."""
    config = tiny(data_dir, validation_interval=3)
    run_dir = tmp_path_factory.mktemp("run")
    return Finished(config, run_dir, fit(config, run_dir))
