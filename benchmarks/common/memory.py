"""How far some steps raise a process's memory; needs torch alone, so that every peer can use it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def rise(run: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Return the bytes by which the peak during `run` exceeds the memory before it.

    On CUDA, of allocated memory, else resident. `weights` are those that are there already: read
    once, because a file's pages become resident only when they are first used.
    """
    if any([weight.sum().is_cuda for weight in weights]):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # Not ru_maxrss: it keeps the peak of loading, and that of the process which started this one.
    CLEAR.write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Return a field of the process's status, in bytes."""
    found = re.search(rf"^{field}:\s*(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{STATUS} has no {field} on {os.uname().sysname}")
    return int(found[1]) * 1024
