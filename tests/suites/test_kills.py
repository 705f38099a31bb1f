"""A suite that is killed at random moments ends with the results of an undisturbed run."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from furina.records import RunRecord
from furina.records.cells import suite_records
from furina.storage import sha256_file
from furina.suites import Folders, read_suite, run_suite
from tests.experiment.helpers import OPTIONS, SMALL, time_few_tokens, write_data
from tests.suites.helpers import lora, write_suite
from tests.training.helpers import PROCESSES


def run(root: Path, place: str) -> None:
    """Run the suite of three cells to its end or to death."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        time_few_tokens(patch)
        run_suite(
            read_suite(root / "own"), Folders(root / place / "results", root / place / "runs")
        )


def start(root: Path, place: str) -> Any:
    child = PROCESSES.Process(target=run, args=(root, place), daemon=True)
    child.start()
    return child


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    shared = {**SMALL, "data_dir": write_data(root / "data")}
    furina = {"method": "furina", "adapter": OPTIONS["furina"]}
    write_suite(
        root / "own",
        shared,
        base={"method": "base"},
        furina={**furina, "sweep": {"seed": [0, 1]}},
        lora=lora(adapter=OPTIONS["lora"]),
    )
    return root


def without_course(record: RunRecord) -> dict[str, Any]:
    """Return what must not depend on when, or how often, a cell was begun."""
    plain = {**vars(record), "started": None, "finished": None}
    plain["latency"] = [(each.variant, each.prompt_tokens) for each in record.latency]
    training = record.training
    plain["training"] = training and {**vars(training), "seconds": 0, "peak_memory_bytes": 0}
    return plain


def cells(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Return each run's record, and the hashes of the files beside it."""
    return {
        record.name: (
            without_course(record),
            {part.name: sha256_file(part) for part in file.parent.glob("samples-*")},
        )
        for file, record in suite_records(folder)
    }


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_no_result(root: Path, kills: int) -> None:
    began = time.monotonic()
    places = [f"{kills} whole", f"{kills} killed"]
    whole = start(root, places[0])
    whole.join(600)
    duration = time.monotonic() - began
    assert whole.exitcode == 0
    moments = random.Random(7)
    killed = 0
    while killed < kills:
        child = start(root, places[1])
        child.join(moments.uniform(0.05, 0.6) * duration)
        if child.exitcode is None:
            child.kill()
            child.join(600)
            assert child.exitcode == -signal.SIGKILL
            killed += 1
        else:  # it went on where it was and ended sooner than the moment: look earlier
            duration *= 0.7
    last = start(root, places[1])
    last.join(600)
    assert last.exitcode == 0
    folders = [root / place / "results" for place in places]
    whole_cells, killed_cells = (cells(folder / "own") for folder in folders)
    assert whole_cells == killed_cells and len(whole_cells) == 4
    assert sum(len(samples) for _, samples in whole_cells.values()) == 7  # of each variant
    hidden = {file.name for file in folders[1].rglob(".*")}
    assert hidden == {".lock"}  # nothing half-written
    assert len(list((folders[1] / "cells").iterdir())) == 4 + 1
