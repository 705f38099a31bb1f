"""Where a number came from: versions, commit, hardware; and what it cost in memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from furina.records import codec

PACKAGES = (
    "furina",
    "torch",
    "lightning",
    "transformers",
    "tokenizers",
    "lm_eval",
    "datasets",
    "numpy",
    "safetensors",
    "torchmetrics",
    "jsonargparse",
)
GENERATED = (":(exclude,top)results", ":(exclude,top)README.md")


@dataclass(frozen=True)
class Hardware:
    """The machine: `cores` are those the process may use, `threads` torch's own.

    `auto_dtype` is what dtype "auto" stands for there, and why; null without torch.
    """

    cpu: str
    cores: int
    threads: int
    memory_bytes: int
    accelerator: str | None
    auto_dtype: str | None = codec.later(None)


@dataclass(frozen=True)
class Provenance:
    """Versions, commit and machine; `commit` and `dirty` are null outside a git checkout."""

    python: str
    packages: dict[str, str]
    commit: str | None
    dirty: bool | None
    hardware: Hardware


def provenance() -> Provenance:
    """Describe this process: call it after torch was imported, or threads are the cores."""
    commit, dirty = git_state(Path(__file__).resolve().parents[2])
    return Provenance(platform.python_version(), _versions(), commit, dirty, _hardware())


def timestamp() -> str:
    """Return the time now, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """Return (commit, dirty) of a checkout, (None, None) elsewhere or without git.

    results/ and README.md do not count: a run and its report write there themselves.
    """
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    # A package in a virtual environment may lie inside somebody else's checkout.
    if not commit or not _git(root, "ls-files", "--", "furina/__init__.py"):
        return None, None
    changes = _git(root, "status", "--porcelain", "--", ".", *GENERATED)
    return commit, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _torch() -> Any:
    # Reporting reads records without torch, so it is used only where it is already loaded.
    return sys.modules.get("torch")


def _hardware() -> Hardware:
    torch = _torch()
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return Hardware(
        cpu=_cpu_model(),
        cores=cores,
        threads=torch.get_num_threads() if torch else cores,
        memory_bytes=memory_bytes(),
        accelerator=torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        auto_dtype=_auto_dtype() if torch else None,
    )


def _auto_dtype() -> str:
    from furina.kernels.processor import automatic, best_device

    return ": ".join(automatic(best_device()))


def memory_bytes() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def reset_peak_memory() -> bool:
    """Start a new measurement for `peak_memory_bytes`; return whether the system allows it.

    Where it does not, the peak stays that of the whole process.
    """
    torch = _torch()
    if torch and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory_bytes() -> int:
    """Return the peak memory in bytes: allocated on the CUDA device, else resident."""
    torch = _torch()
    if torch and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text() if status.exists() else "", re.M)
    return int(found[1]) * 1024 if found else _max_resident_bytes()


def _max_resident_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
