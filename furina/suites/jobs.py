"""Hand a suite's cells to submitit: as processes of this machine, or as jobs of Slurm."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit import Job, LocalExecutor, SlurmExecutor
from submitit.core.utils import DelayedSubmission, UncompletedJobError
from submitit.slurm.slurm import _make_sbatch_string

from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.progress import shown
from furina.records import timestamp
from furina.suites.cells import Folders, Outcome, help_to_train, record_failure, run_when_free
from furina.suites.run import Progress, files_of, require_one_dtype
from furina.suites.suite import Suite

POLL = 0.5
"""Seconds between looks at the running jobs; submitit asks Slurm itself more seldom."""
FOREVER = 60 * 24 * 365
"""Minutes that a job of this machine may take: nothing would restart one that was stopped."""


@dataclass(frozen=True)
class Slurm:
    """What each job asks of Slurm.

    Attributes:
        partition: where it runs; the cluster's default if none.
        hours: time limit; a job that reaches it is requeued and goes on from its checkpoint.
        gpus_per_node: accelerators of each machine, 0 for none.
        cpus_per_task: processor cores.
        mem_gb: memory of each machine in GB; the cluster's default if none.
        account: account that is charged; the user's default if none.
        setup: shell commands before it starts, such as the loading of modules.
    """

    partition: str | None = None
    hours: float = 12.0
    gpus_per_node: int = 1
    cpus_per_task: int = 8
    mem_gb: int | None = None
    account: str | None = None
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what sbatch would take for no limit, or not at all."""
        for name in ("hours", "mem_gb", "cpus_per_task"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"slurm.{name}={value} must be larger than 0.")
        if self.gpus_per_node < 0:
            raise ConfigurationError(
                f"slurm.gpus_per_node={self.gpus_per_node} must not be negative."
            )

    def parameters(self, config: RunConfig, at_once: int) -> dict[str, Any]:
        """Return sbatch's parameters, in submitit's Slurm words, for cells like `config`."""
        named = {"partition": self.partition, "account": self.account}
        optional: dict[str, Any] = {"mem": f"{self.mem_gb}GB"} if self.mem_gb else {}
        if self.gpus_per_node:
            optional["gpus_per_node"] = max(self.gpus_per_node, config.devices)
        return {
            "job_name": "furina",
            "time": max(1, round(60 * self.hours)),
            "nodes": config.num_nodes,
            "ntasks_per_node": 1,  # torch.distributed.run starts the processes of a machine
            "cpus_per_task": self.cpus_per_task,
            "array_parallelism": at_once,
            "signal_delay_s": 120,
            "setup": list(self.setup) or None,
            **optional,
            **{name: value for name, value in named.items() if value},
        }


class CellJob:
    """What a job runs; one that the cluster stops is queued again and goes on."""

    def __init__(self, suite: Suite, config: RunConfig, folders: Folders, share: int = 1):
        """Run `config` in absolute `folders`, on the `share`-th part of this machine's cores."""
        self.suite, self.config, self.folders, self.share = suite, config, folders, share

    def __call__(self) -> Outcome | None:
        """Run the cell; a further machine only helps to train it, and returns None."""
        from furina.experiment.processes.launch import is_first_machine
        from furina.kernels.processor import use_cores

        use_cores(self.share)
        print(f"dtype {self.config.resolved().dtype}", flush=True)
        if is_first_machine():
            with shown(sys.stdout):  # its file; the last line of stderr says why a job died
                return run_when_free(self.suite, self.config, self.folders)
        help_to_train(self.config, self.folders)
        return None

    def checkpoint(self) -> DelayedSubmission:
        """Return what submitit queues in its place when it is stopped."""
        return DelayedSubmission(self)


@dataclass(frozen=True)
class _Running:
    """A job that has been started: its index in the suite, and when that was."""

    index: int
    config: RunConfig
    job: Job[Any]
    began: float
    started: str = field(default_factory=timestamp)


def run_jobs(suite: Suite, folders: Folders, jobs: int, slurm: Slurm | None = None) -> list[Path]:
    """Run every cell that is not finished, `jobs` at once; returns the records' files.

    A cell is a process of this machine, or with `slurm` a job of an array. Stopping this process
    with Ctrl-C stops them. Raises FailedRunsError at the end if runs failed or diverged, and
    ConfigurationError where there is no Slurm.
    """
    folders = Folders(folders.results.resolve(), folders.runs.resolve())
    if slurm is None:  # a cluster's machines may be of another kind than this one
        require_one_dtype(suite, folders)
    calls = [CellJob(suite, config, folders, 1 if slurm else jobs) for config in suite.runs]
    if slurm is not None:  # the array's own limit says how many run at once
        submitted = _submit_array(suite, calls, folders, slurm, jobs)
        return files_of(suite, _drain(suite, folders, submitted.__getitem__, len(calls), jobs))
    executor = LocalExecutor(folders.runs / "jobs")
    executor.update_parameters(timeout_min=FOREVER)
    outcomes = _drain(suite, folders, lambda index: executor.submit(calls[index]), jobs, jobs)
    return files_of(suite, outcomes)


def _drain(
    suite: Suite,
    folders: Folders,
    start: Callable[[int], Job[Any]],
    started: int,
    at_once: int,
) -> list[Outcome]:
    """Start a job for every run, `started` at a time, and wait for them all.

    `at_once` of them run at a time. Slurm's jobs are submitted long before they run, so a job is
    assumed to begin when there is room for it.
    """
    progress = Progress(list(suite.runs), jobs=at_once)
    rooms = [progress.clock()] * at_once
    waiting, running = list(enumerate(suite.runs)), list[_Running]()
    outcomes: dict[int, Outcome] = {}
    try:
        while waiting or running:
            while waiting and len(running) < started:
                index, config = waiting.pop(0)
                running.append(_Running(index, config, start(index), progress.clock()))
            for each in [each for each in running if each.job.done()]:
                running.remove(each)
                outcomes[each.index] = _outcome(suite, folders, each)
                now, began = progress.clock(), max(each.began, min(rooms))
                rooms[rooms.index(min(rooms))] = now
                progress.end(each.config, outcomes[each.index], now - began)
            time.sleep(POLL)
    except BaseException:
        for each in running:
            each.job.cancel()
        raise
    return [outcomes[index] for index in sorted(outcomes)]


def _outcome(suite: Suite, folders: Folders, ended: _Running) -> Outcome:
    """Return the outcome of a job that has ended; a killed job has failed."""
    try:
        outcome: Outcome = ended.job.results()[0]
    except UncompletedJobError as error:
        reason = "its process ended without a result, killed or out of memory"
        reason += f" ({words})" if (words := last_words(str(error))) else ""
        file = record_failure(suite, ended.config, ended.started, reason, folders.results)
        return Outcome("failed", file, reason)
    return outcome


def last_words(message: str) -> str:
    """Return the last line of a job's error stream that is its own, "" where there is none.

    `message` is what submitit says of a job without a result: the stream stands below dashes, with
    lines of submitit's own log.
    """
    _, _, stream = message.partition(f"\n{'-' * 40}\n")
    own = [line for line in stream.splitlines() if line.strip() and not _LOGGED.match(line)]
    return own[-1].strip() if own else ""


_LOGGED = re.compile(r"submitit [A-Z]+ \(")


def slurm_script(suite: Suite, folders: Folders, jobs: int, slurm: Slurm) -> str:
    """Return the sbatch script of the suite's job array, without a cluster at hand."""
    parameters = slurm.parameters(_largest(suite), jobs)
    command = f"python -u -m submitit.core._submit {folders.runs / 'jobs'}"
    script: str = _make_sbatch_string(
        command, folders.runs / "jobs", map_count=len(suite.runs), **parameters
    )
    return script


def _submit_array(
    suite: Suite, calls: Sequence[CellJob], folders: Folders, slurm: Slurm, jobs: int
) -> list[Any]:
    try:
        executor = SlurmExecutor(folders.runs / "jobs")
    except RuntimeError as error:
        raise ConfigurationError(
            "There is no Slurm here (no srun): leave out --cluster slurm, or print the script with "
            "--dry-run."
        ) from error
    executor.update_parameters(**slurm.parameters(_largest(suite), jobs))
    return list(executor.submit_array(calls))


def _largest(suite: Suite) -> RunConfig:
    """Return the run that needs most devices: an array's jobs all ask for the same."""
    return max(suite.runs, key=lambda run: (run.num_nodes, run.devices))
