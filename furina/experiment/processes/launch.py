"""Start the processes that train a run together, through torchelastic, and wait for them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.experiment.processes.failures import failure
from furina.kernels.processor import best_device

WORKER = "furina.experiment.worker"
"""The module that each process runs."""
PATIENCE = 3600
"""Seconds that a machine waits for the others to start."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def require_devices(config: RunConfig) -> None:
    """Raise ConfigurationError unless the run's devices can share its batches and are there."""
    world, devices = config.world_size, config.devices
    if config.batch_size % world:
        raise ConfigurationError(
            f"batch_size={config.batch_size} cannot be shared evenly by {world} devices: choose a "
            "multiple."
        )
    present = torch.accelerator.device_count()
    if best_device() != "cpu" and devices > present:
        raise ConfigurationError(
            f"devices={devices}, but this machine has {present}: choose at most as many."
        )
    if config.strategy == "fsdp" and config.compile:
        raise ConfigurationError(
            f"compile={config.compile} does not work with strategy fsdp, whose hooks break the "
            "graph: leave out compile, or use strategy ddp."
        )
    rendezvous(config.num_nodes, run_id="")


def launch(config: RunConfig, run_dir: Path) -> None:
    """Train the run whose config is in `run_dir` with as many processes as the config says.

    This starts the processes of this machine; under Slurm each machine's task calls it, and all
    train together. The output of the first process is shown. The output of the others is shown only
    if one of them fails, which ends the rest. The processes exit when this one exits.

    Raises the FurinaError that a process raised, or one that says how a process ended.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory() as logs, _undisturbed():
        shown = 0 if config.num_nodes == 1 or is_first_machine() else None
        hidden = {rank: Std.ALL for rank in range(config.devices) if rank != shown}
        plan = LaunchConfig(
            min_nodes=config.num_nodes,
            max_nodes=config.num_nodes,
            nproc_per_node=config.devices,
            max_restarts=0,
            signals_to_handle=",".join(number.name for number in SIGNALS if _is_heeded(number)),
            logs_specs=DefaultLogsSpecs(logs, redirects=hidden),
            **rendezvous(config.num_nodes, run_id=run_dir.name),
        )
        try:
            elastic_launch(plan, sys.executable)("-m", WORKER, str(run_dir), str(os.getpid()))
        except ChildFailedError as error:
            log = run_dir / "logs" / "failure.log"
            raise failure(error.failures, _output(Path(logs), error.failures), log) from None


def is_first_machine() -> bool:
    """Return whether this is the machine of rank 0, by Slurm's environment."""
    return os.environ.get("SLURM_NODEID", "0") == "0"


def rendezvous(num_nodes: int, run_id: str) -> dict[str, Any]:
    """Return where the processes meet, as options of torchelastic's LaunchConfig.

    Several machines meet at the first one of Slurm's list, or at MASTER_ADDR and MASTER_PORT.
    Raises ConfigurationError if Slurm has not started one task on each of `num_nodes` machines.
    """
    if num_nodes == 1:
        here = {"rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
        return {"rdzv_backend": "c10d", "run_id": run_id, **here}
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    own = os.environ
    if own.get("SLURM_NNODES") != str(num_nodes) or "SLURM_NODEID" not in own:
        raise ConfigurationError(
            f"num_nodes={num_nodes}, but Slurm started this on {own.get('SLURM_NNODES', 'none')}: "
            f"use srun --nodes={num_nodes} --ntasks-per-node=1."
        )
    head = own.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(
        own.get("SLURM_JOB_NODELIST", "")
    )
    job = own.get("SLURM_JOB_ID", "0")
    port = own.get("MASTER_PORT") or str(15000 + int(job) % 10000)
    return {
        "rdzv_backend": "static",
        "rdzv_endpoint": f"{head}:{port}",
        "rdzv_configs": {"rank": int(own["SLURM_NODEID"]), "timeout": PATIENCE},
        "run_id": f"{job}-{run_id}",
    }


def _is_heeded(number: signal.Signals) -> bool:
    """Return whether this process heeds a signal: under nohup it ignores SIGHUP."""
    return signal.getsignal(number) is not signal.SIG_IGN


def _output(logs: Path, failures: Mapping[int, Any]) -> dict[int, str]:
    """Return what the failed processes wrote on stderr, by rank."""
    found = {}
    for rank, failed in failures.items():
        for file in logs.glob(f"*/attempt_0/{failed.local_rank}/stderr.log"):
            found[rank] = file.read_text(encoding="utf-8", errors="replace")
    return found


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep torchelastic's log messages off the terminal, and restore the signal handlers.

    torchelastic replaces them; a signal that arrived meanwhile is raised again afterwards.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    silent = logging.root.manager.disable
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS if main}
    logging.disable(logging.ERROR)
    came = None
    try:
        yield
    except SignalException as caught:
        came = caught.sigval
        raise
    finally:
        logging.disable(silent)
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came is not None:
            signal.raise_signal(came)
