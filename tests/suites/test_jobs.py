"""Cells as processes of this machine through submitit, and as Slurm's script."""

from __future__ import annotations

import os
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from submitit import LocalExecutor

from furina.errors import ConfigurationError
from furina.records import RunRecord
from furina.records.cells import suite_records
from furina.suites import FailedRunsError, Folders, Suite, read_suite
from furina.suites import jobs as jobs_module
from furina.suites.cells import Outcome, run_one
from furina.suites.jobs import CellJob, Slurm, last_words, run_jobs, slurm_script
from furina.suites.run import Progress
from tests.experiment.helpers import OPTIONS, SMALL, write_data
from tests.suites.helpers import lora, write_suite


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("suite")
    shared = {**SMALL, "steps": 2, "latency_rounds": 0, "data_dir": write_data(folder / "data")}
    furina = {"method": "furina", "adapter": OPTIONS["furina"]}
    files = {"base": {"method": "base"}, "furina": furina, "lora": lora(adapter=OPTIONS["lora"])}
    return read_suite(write_suite(folder / "own", shared, **files))


@pytest.fixture(scope="module")
def alone(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The base's and LoRA's records by name, made by this process."""
    folder = tmp_path_factory.mktemp("alone")
    folders = Folders(folder / "results", folder / "runs")
    few = suite.chosen(["base", "lora"])
    for config in few.runs:
        run_one(few, config, folders)
    return {name: without_course(record) for name, record in records_of(folders).items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def records_of(folders: Folders) -> dict[str, RunRecord]:
    found = suite_records(folders.results / "own")
    return {record.name: record for _, record in found}


def without_course(record: RunRecord) -> dict[str, Any]:
    """Return what must not depend on when, where or how fast a cell was run."""
    plain = {**vars(record), "started": None, "finished": None, "command": None}
    training = record.training
    plain["training"] = training and {**vars(training), "seconds": 0, "peak_memory_bytes": 0}
    return plain


class Doomed(CellJob):
    """A job whose process is killed if it is FURINA's, as the kernel kills one for its memory."""

    def __call__(self) -> Any:
        if self.config.method == "furina":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return super().__call__()


def test_a_grid_runs_as_processes_gives_what_one_process_gives_and_outlives_a_killed_one(
    suite: Suite,
    alone: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs_module, "CellJob", Doomed)
    folders = Folders(tmp_path / "results", tmp_path / "runs")
    with pytest.raises(FailedRunsError, match=r"Of 3 runs 1 failed: furina.*ended without a"):
        run_jobs(suite, folders, jobs=2)
    records = records_of(folders)
    assert set(records) == {run.name for run in suite.runs}
    killed = records.pop("furina--arc_easy--seed0")
    assert killed.status == "failed"
    assert killed.error == "its process ended without a result, killed or out of memory"
    assert {name: without_course(record) for name, record in records.items()} == alone


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (
            "Traceback\nMemoryError: 3 GiB\nsubmitit INFO (2026-01-01 00:00:00,1) - Exit\n\n",
            "Memory",
        ),
        ("submitit WARNING (2026-01-01 00:00:00,1) - Bypassing signal SIGTERM\n", ""),
        ("", ""),
    ],
)
def test_a_failure_tells_the_last_words_of_the_process_itself(stream: str, words: str) -> None:
    said = f"Job 1 with path x\nhas not produced any output\nError stream produced:\n{'-' * 40}\n"
    found = last_words(said + stream)
    assert found.startswith(words) and bool(found) == bool(words)


def test_the_script_for_slurm_asks_for_what_is_said(suite: Suite, tmp_path: Path) -> None:
    asked = Slurm(partition="gpu", hours=1.5, gpus_per_node=2, mem_gb=40, setup=("module load x",))
    script = slurm_script(suite, Folders(tmp_path, tmp_path / "runs"), 1, asked)
    flags = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    assert script.startswith("#!/bin/bash")
    assert flags["partition"] == "gpu" and flags["time"] == "90" and flags["mem"] == "40GB"
    assert flags["gpus-per-node"] == "2" and flags["array"] == "0-2%1" and flags["nodes"] == "1"
    assert "\nmodule load x\n" in script and "account" not in flags


def test_a_job_without_accelerators_asks_for_none_and_the_shortest_takes_a_minute(
    suite: Suite, tmp_path: Path
) -> None:
    folders = Folders(tmp_path, tmp_path / "runs")
    script = slurm_script(suite, folders, 1, Slurm(gpus_per_node=0, hours=0.001))
    assert "gpus-per-node" not in script and "#SBATCH --time=1\n" in script


@pytest.mark.parametrize(
    "asked",
    [{"hours": 0}, {"hours": -3}, {"mem_gb": -4}, {"cpus_per_task": 0}, {"gpus_per_node": -1}],
)
def test_what_slurm_would_take_for_no_limit_is_refused(asked: dict[str, Any]) -> None:
    (name,) = asked
    with pytest.raises(ConfigurationError, match=f"slurm.{name}="):
        Slurm(**asked)


def test_without_slurm_it_says_so(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match="There is no Slurm here"):
        run_jobs(suite, Folders(tmp_path, tmp_path / "runs"), 1, Slurm())


class ArrayHere(LocalExecutor):
    """Slurm's executor, whose array is of this machine's processes."""

    asked: ClassVar[dict[str, Any]] = {}

    def update_parameters(self, **parameters: Any) -> None:
        self.asked.update(parameters)
        super().update_parameters(timeout_min=60)


@pytest.mark.slow  # the grid of processes beside it does the same without Slurm's array
def test_a_job_array_gives_what_one_process_gives(
    suite: Suite,
    alone: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs_module, "SlurmExecutor", ArrayHere)
    few = suite.chosen(["base", "lora"])
    folders = Folders(tmp_path / "results", tmp_path / "runs")
    run_jobs(few, folders, 1, Slurm(hours=2))
    assert ArrayHere.asked["array_parallelism"] == 1 and ArrayHere.asked["time"] == 120
    found = {name: without_course(record) for name, record in records_of(folders).items()}
    assert found == alone


def test_the_time_left_of_an_array_does_not_count_the_queue(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, said = [0.0], list[str]()

    class Timed:
        def __init__(self, end: float) -> None:
            self.end = end

        def done(self) -> bool:
            return now[0] >= self.end

        def results(self) -> list[Outcome]:
            return [Outcome("finished")]

    def sleep(seconds: float) -> None:
        now[0] += 60

    monkeypatch.setattr(jobs_module.time, "sleep", sleep)
    monkeypatch.setattr(
        jobs_module, "Progress", partial(Progress, say=said.append, clock=lambda: now[0])
    )
    monkeypatch.setattr(
        jobs_module, "_submit_array", lambda *given: [Timed(600.0 * (i + 1)) for i in range(3)]
    )
    run_jobs(suite, Folders(tmp_path, tmp_path / "runs"), 1, Slurm())
    assert said[1::2] == ["  2 left", "  1 left, about 10:00 min"]


def test_a_job_that_slurm_stops_is_queued_again_as_it_is(suite: Suite, tmp_path: Path) -> None:
    job = CellJob(suite, suite.runs[0], Folders(tmp_path, tmp_path), None)
    assert job.checkpoint().function is job
