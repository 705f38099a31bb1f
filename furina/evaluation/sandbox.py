"""Run a program that a model wrote, in a process of its own, and tell whether it passed.

This is a seat belt, not a security boundary. It stops what a model writes by accident: endless
loops, memory hogs, files written or removed, processes, network. A program written to break out
can do so, because it shares its interpreter with the guard, and it can read what this user can
read. Hence nothing here runs without the user's explicit word; for outputs of a model that is
not trusted, run all of it in a container or a virtual machine.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from furina.errors import ConfigurationError

TIMEOUT = 10.0
MEMORY_MB = 1024
_LEAST_MEMORY_MB = 128
_CHILD = Path(__file__).with_name("sandbox_child.py")
_REPORT_BYTES = 65536


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its end, and why not: "passed", "timed out", "ValueError: …"."""

    passed: bool
    reason: str


def run_program(source: str, timeout: float = TIMEOUT, memory_mb: int = MEMORY_MB) -> Outcome:
    """Run `source` to its end in a fresh interpreter; only reaching the end passes.

    The interpreter has the standard library alone, an empty folder to work in, no environment,
    no input; its output is discarded. It may use `memory_mb` MiB of address space and `timeout`
    seconds, after which it is killed with all it started. Where the kernel grants it, it has a
    network namespace of its own; always, an audit hook refuses sockets, processes, signals,
    foreign libraries and writing outside its folder.

    That the end was reached is reported with a random token over a pipe of its own: an exit
    status, or anything printed, counts for nothing. See the module for what this does not stop.

    Raises:
        ConfigurationError: a limit is too small to run anything.
    """
    if timeout <= 0 or memory_mb < _LEAST_MEMORY_MB:
        raise ConfigurationError(
            f"A program needs time and at least {_LEAST_MEMORY_MB} MB of memory, not "
            f"timeout={timeout} and memory_mb={memory_mb}."
        )
    token = secrets.token_hex(16)
    reader, writer = os.pipe()
    try:
        with tempfile.TemporaryDirectory(prefix="furina-", ignore_cleanup_errors=True) as folder:
            try:
                process = _start(folder, writer, timeout, memory_mb)
            finally:
                os.close(writer)
            timed_out = _finish(process, f"{token}\n{source}", timeout)
        return _outcome(process.returncode, timed_out, _report(reader, token))
    finally:
        os.close(reader)


def _start(folder: str, writer: int, timeout: float, memory_mb: int) -> subprocess.Popen[bytes]:
    # -I: no user site, no variables, no current folder; -S: no site-packages.
    limits = [str(writer), str(timeout), str(memory_mb)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD), *limits],
        cwd=folder,
        env={},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(writer,),
        start_new_session=True,
    )


def _finish(process: subprocess.Popen[bytes], source: str, timeout: float) -> bool:
    """Give the process its source, wait, kill its whole group; return whether time ran out."""
    timed_out = False
    try:
        process.communicate(source.encode("utf-8", "surrogatepass"), timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:  # an interrupted evaluation must not leave programs behind either
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return timed_out


def _report(reader: int, token: str) -> str | None:
    """Return what the guard reported, None if it did not get to it."""
    os.set_blocking(reader, False)  # something may still hold the other end
    try:
        data = os.read(reader, _REPORT_BYTES)
    except BlockingIOError:
        return None
    for line in data.decode("utf-8", "replace").splitlines():
        if line.startswith(token):
            return line.removeprefix(token).strip()
    return None


def _outcome(status: int, timed_out: bool, report: str | None) -> Outcome:
    if timed_out or -status == signal.SIGXCPU:
        return Outcome(False, "timed out")
    if report is not None:
        passed, _, reason = report.partition(" ")
        return Outcome(passed == "1", reason)
    if status < 0:
        return Outcome(False, f"killed by {signal.Signals(-status).name}")
    return Outcome(False, f"exited before its end (status {status})")
