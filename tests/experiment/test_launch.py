"""Processes are started, shown, ended and reported as one; the workers here train nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from furina import errors
from furina.errors import ConfigurationError, FurinaError
from furina.experiment.config import RunConfig
from furina.experiment.fit import fit
from furina.experiment.processes import launch as launch_module
from furina.experiment.processes.failures import failure
from furina.experiment.processes.launch import launch, rendezvous, require_devices
from furina.training import DivergedError
from tests.experiment.helpers import tiny
from tests.training.helpers import PROCESSES

ROOT = Path(__file__).parents[2]
TWO = RunConfig(devices=2)


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_module, "WORKER", "tests.experiment.stub_worker")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def behaving(folder: Path, **ranks: list[str]) -> Path:
    """Return a run's folder in which rank0=[…], rank1=[…] say what the processes do."""
    plan = {name.removeprefix("rank"): what for name, what in ranks.items()}
    folder.mkdir(exist_ok=True)
    (folder / "behaviour.json").write_text(json.dumps(plan))
    return folder


def started(folder: Path, rank: int, patience: float = 200) -> dict[str, Any]:
    """Return what process `rank` wrote when it began, waiting for it."""
    file, end = folder / f"rank{rank}.json", time.monotonic() + patience
    while not file.exists() or not file.read_text().endswith("}"):
        assert time.monotonic() < end, f"rank {rank} has not started"
        time.sleep(0.05)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def wait_until_gone(pid: int, patience: float = 90) -> None:
    end = time.monotonic() + patience
    while Path(f"/proc/{pid}").exists() and "Z (zombie)" not in _status(pid):
        assert time.monotonic() < end, f"{pid} is still there"
        time.sleep(0.05)


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return "Z (zombie)"


def test_each_process_has_a_rank_and_only_the_first_is_seen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    launch(TWO, behaving(tmp_path))
    for rank in range(2):
        own = started(tmp_path, rank)
        assert (own["RANK"], own["LOCAL_RANK"], own["WORLD_SIZE"]) == (str(rank), str(rank), "2")
    written = capfd.readouterr()
    assert written.out == "rank 0 was here\n" and written.err == ""
    assert {path.name for path in tmp_path.iterdir()} == {
        *("behaviour.json", "rank0.json", "rank1.json")
    }


@pytest.mark.parametrize("kind", ["ConfigurationError", "DataError", "FurinaError"])
def test_an_error_of_furinas_own_stays_what_it_is(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FurinaError, match=rf"^{kind} said\.$") as caught:
        launch(TWO, behaving(tmp_path, rank1=["raise", kind], rank0=["wait", "60"]))
    assert type(caught.value) is getattr(errors, kind)


def test_a_run_that_diverged_says_at_which_step(tmp_path: Path) -> None:
    ranks = {f"rank{rank}": ["raise", "DivergedError"] for rank in range(2)}
    with pytest.raises(DivergedError) as caught:
        launch(TWO, behaving(tmp_path, **ranks))
    assert caught.value.step == 7 and "at step 7" in str(caught.value)


@pytest.mark.parametrize(
    ("end", "said", "logged"),
    [
        (["exit", "no memory"], "failed with exit code 3: first line | second line | no memory", 4),
        (["crash", "no memory"], "failed with exit code 3: ", 4),
        (["die", ""], "was ended by SIGKILL (", 0),
    ],
)
def test_a_process_that_ends_is_one_sentence_and_the_others_are_ended(
    end: list[str], said: str, logged: int, tmp_path: Path
) -> None:
    with pytest.raises(FurinaError) as caught:
        launch(TWO, behaving(tmp_path, rank1=end, rank0=["wait", "100"]))
    both_begun = (tmp_path / "rank0.json").stat().st_mtime
    sentence, log = str(caught.value), tmp_path / "logs" / "failure.log"
    assert type(caught.value) is FurinaError and "\n" not in sentence
    assert f"Training process 1 {said}" in sentence and str(log) in sentence
    assert "the same command goes on from the last checkpoint" in sentence
    assert ("TypeError: no memory" in sentence) == (end[0] == "crash")
    assert len(log.read_text().splitlines()) == logged
    assert time.time() - both_begun < 90  # rank 0 would wait 100 s
    wait_until_gone(started(tmp_path, 0)["pid"])


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([(1, 100), (1, 99)], 1),  # two that failed: the earlier
        ([(1, 99), (-9, 100)], 1),  # killed, and a complaint noted before it was seen to be gone
        ([(-15, 100), (1, 101)], 1),  # ended by the launcher
        ([(1, 100), (-9, 130)], 0),  # killed by the launcher, which waits half a minute
        ([(-9, 130), (-15, 100), (-11, 101)], 2),
    ],
)
def test_of_several_ends_the_one_that_caused_the_others_is_told(
    ends: list[tuple[int, int]], first: int, tmp_path: Path
) -> None:
    failures = {
        rank: SimpleNamespace(exitcode=code, timestamp=at, error_file_data={})
        for rank, (code, at) in enumerate(ends)
    }
    said = failure(failures, {}, tmp_path / "log")  # type: ignore[arg-type]
    assert str(said).startswith(f"Training process {first} ")


def test_the_process_that_was_killed_is_named_and_not_those_it_took_along(tmp_path: Path) -> None:
    ranks = {"rank0": ["miss", "connection closed by peer"], "rank1": ["die", ""]}
    with pytest.raises(FurinaError, match="process 1 was ended by SIGKILL"):
        launch(TWO, behaving(tmp_path, **ranks))


def test_an_interrupt_ends_the_processes_and_signals_mean_what_they_did(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # pytest-xdist's processes ignore the signal, and it may come before anybody listens for it.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in launch_module.SIGNALS}
    waiting = behaving(tmp_path, rank0=["wait", "100"], rank1=["wait", "100"])

    def interrupt() -> None:
        started(waiting, 0), started(waiting, 1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(TWO, waiting)
    assert {number: signal.getsignal(number) for number in launch_module.SIGNALS} == before
    assert logging.root.manager.disable == logging.NOTSET
    for rank in range(2):
        wait_until_gone(started(waiting, rank)["pid"])


def launch_with_stub(folder: Path) -> None:
    launch_module.WORKER = "tests.experiment.stub_worker"
    launch(TWO, folder)


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path: Path) -> None:
    waiting = behaving(tmp_path, rank0=["wait", "100"], rank1=["wait", "100"])
    launcher = PROCESSES.Process(target=launch_with_stub, args=(waiting,), daemon=False)
    launcher.start()
    pids = [started(waiting, rank)["pid"] for rank in range(2)]
    launcher.kill()
    launcher.join(100)
    for pid in pids:
        wait_until_gone(pid)


def test_a_config_that_its_processes_refuse_does_not_own_the_folder(
    data_dir: str, tmp_path: Path
) -> None:
    refused = behaving(tmp_path, rank0=["raise", "ConfigurationError"])
    with pytest.raises(ConfigurationError, match="said"):
        fit(tiny(data_dir, devices=2), refused)
    assert not (refused / "config.json").exists()
    with pytest.raises(FurinaError, match="SIGKILL"):
        fit(tiny(data_dir, devices=2), behaving(tmp_path, rank0=["die", ""]))
    assert (refused / "config.json").exists()
    with pytest.raises(ConfigurationError, match="other settings"):
        fit(tiny(data_dir, devices=2, seed=1), refused)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"devices": 3}, "batch_size=16 cannot be shared evenly by 3 devices: choose a multiple"),
        (
            {"devices": 2, "strategy": "fsdp", "compile": "eager"},
            "does not work with strategy fsdp",
        ),
        (
            {"num_nodes": 2, "dtype": "float32"},
            "Slurm started this on none: use srun --nodes=2 --ntasks-per-node=1",
        ),
    ],
)
def test_devices_that_cannot_share_a_run_are_refused_before_anything_is_read(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_NNODES", raising=False)
    config = RunConfig(data_dir=str(tmp_path / "absent"), **changes)
    with pytest.raises(ConfigurationError, match=said):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_devices_than_there_are_accelerators_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_module, "best_device", lambda: "cuda")
    monkeypatch.setattr(launch_module.torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ConfigurationError, match="devices=2, but this machine has 1"):
        require_devices(TWO)


SLURM = {
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "1",
    "SLURM_JOB_NODELIST": "gpu[07-08],login",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({}, "gpu07:18456"),
        ({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, "10.0.0.1:29500"),
    ],
)
def test_machines_meet_at_the_first_of_slurms_list(
    variables: dict[str, str], endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SLURM, **variables}.items():
        monkeypatch.setenv(name, value)
    found = rendezvous(2, "run")
    assert (found["rdzv_backend"], found["rdzv_endpoint"]) == ("static", endpoint)
    assert found["rdzv_configs"]["rank"] == 1 and found["run_id"] == "123456-run"
    with pytest.raises(ConfigurationError, match="Slurm started this on 2: use srun --nodes=3"):
        rendezvous(3, "run")


def launch_as_node(folder: Path, node: int, port: int) -> None:
    own = {"SLURM_NODEID": str(node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update({**SLURM, **own})
    launch_module.WORKER = "tests.experiment.stub_worker"
    launch(RunConfig(devices=1, num_nodes=2, dtype="float32"), folder)


def test_two_machines_are_one_world(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    behaving(tmp_path)
    machines = [
        PROCESSES.Process(target=launch_as_node, args=(tmp_path, node, port)) for node in range(2)
    ]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(60)
    assert [machine.exitcode for machine in machines] == [0, 0]
    worlds = [started(tmp_path, rank) for rank in range(2)]
    assert [own["LOCAL_RANK"] for own in worlds] == ["0", "0"]
    assert [own["GROUP_RANK"] for own in worlds] == ["0", "1"]
    assert {own["WORLD_SIZE"] for own in worlds} == {"2"}
