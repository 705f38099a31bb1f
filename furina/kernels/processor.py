"""What this machine computes fast: what dtype "auto" stands for, and the cores to compute on."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

AUTO = "auto"
NATIVE_SPEEDUP = 1.25
"""A bfloat16 product this many times as fast as a float32 one is native. With instructions for it
a processor reaches 2 or more, without them at most 1."""
SIDE, ACCELERATOR_SIDE, REPEATS = 256, 2048, 7
"""Side of the square matrices that are multiplied to find out, and how often. An accelerator takes
longer to start small ones than to multiply them."""


SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
"""Where Linux says which logical processors share a core."""


class Precision(NamedTuple):
    """A dtype's name, and why it is that one."""

    dtype: str
    reason: str


def best_device() -> str:
    """Return the accelerator's name ("cuda") where there is one, else "cpu"."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device else "cpu"


def resolve_dtype(name: str, device: str | None = None) -> Precision:
    """Return the dtype that `name` stands for on `device` ("cpu", "cuda"), `best_device()` if none.

    "auto" is bfloat16 where the device multiplies it natively, else float32. It is decided and
    logged once per process; any other name stands for itself.
    """
    if name != AUTO:
        return Precision(name, "asked for")
    kind = torch.device(device or best_device()).type
    _say(kind)
    return automatic(kind)


@cache
def automatic(kind: str) -> Precision:
    """Return what "auto" stands for on a kind of device, without logging it."""
    is_native, reason = native_bfloat16(kind)
    return Precision("bfloat16" if is_native else "float32", reason)


@cache
def _say(kind: str) -> None:
    logger.info("dtype auto is %s: %s.", *automatic(kind))


@cache
def native_bfloat16(kind: str) -> tuple[bool, str]:
    """Tell whether a kind of device multiplies bfloat16 natively, and how that is known.

    CUDA says so itself. What another device reaches is timed, since a library may be held to fewer
    instructions than the processor has.
    """
    if kind == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        has = "has" if is_native else "has no"
        return is_native, f"{torch.cuda.get_device_name()} {has} bfloat16 arithmetic"
    try:
        narrow, wide = _product_seconds(kind, (torch.bfloat16, torch.float32))
    except (RuntimeError, TypeError) as error:
        return False, f"{kind} does not multiply bfloat16 ({str(error).partition(chr(10))[0]})"
    if wide / narrow >= NATIVE_SPEEDUP:
        return True, f"this {kind} multiplies bfloat16 faster than float32"
    return False, f"this {kind} multiplies bfloat16 no faster than float32"


def _product_seconds(kind: str, dtypes: tuple[torch.dtype, ...]) -> list[float]:
    """Return the shortest time of a product in each dtype, taken in turns on one thread."""
    side = SIDE if kind == "cpu" else ACCELERATOR_SIDE
    operands = [torch.ones(side, side, device=kind, dtype=dtype) for dtype in dtypes]
    times: list[list[float]] = [[] for _ in dtypes]
    # Autocast would make both products of one dtype.
    with one_thread(), torch.inference_mode(), torch.autocast(kind, enabled=False):
        for _ in range(REPEATS + 1):
            for own, x in zip(times, operands, strict=True):
                began = time.perf_counter()
                functional.linear(x, x)
                if kind != "cpu":
                    torch.accelerator.synchronize()
                own.append(time.perf_counter() - began)
    return [min(own[1:]) for own in times]  # the first prepares kernels


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside: other processes disturb a single one least."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cores() -> int:
    """Return the physical cores that this process may use, by affinity and cgroup quota."""
    import joblib  # only here: it takes a moment

    usable: int = joblib.cpu_count(only_physical_cores=True)
    if not hasattr(os, "sched_getaffinity"):
        return usable
    # joblib counts both threads of a core where affinity or quota leave out some.
    places = (SIBLINGS.format(cpu) for cpu in os.sched_getaffinity(0))
    physical = {Path(place).read_text() for place in places if os.path.exists(place)}
    return min(usable, len(physical) or usable)


def use_cores(processes: int = 1) -> None:
    """Give this process its threads: its share of `cores()`, or of those that the user named."""
    named = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    threads = torch.get_num_threads() if named else cores()
    torch.set_num_threads(max(1, threads // processes))
