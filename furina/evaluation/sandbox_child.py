"""The guard inside `furina.evaluation.sandbox`'s process; the standard library is all it has.

Usage: python sandbox_child.py REPORT_FD SECONDS MEMORY_MB, the token and the program on stdin.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import types
from collections.abc import Callable

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000
_FILE_BYTES = 16 * 2**20
_FOREIGN = ("socket.", "subprocess.", "ctypes.", "pty.", "sqlite3.", "resource.")
_PROCESSES = ("os.fork", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile")
_REFUSED = (*_FOREIGN, *_PROCESSES, "os.kill", "signal.pthread_kill")
"""How the names of events begin that are never allowed."""
_NAMES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink")
_WITH_FOLDER = (*_NAMES, "os.chmod", "os.chown", "os.utime", "shutil.rmtree")
"""Events whose last argument is the descriptor of the folder that names are relative to."""
_CHANGES = (*_WITH_FOLDER, "os.truncate", "os.setxattr", "os.removexattr", "shutil.move")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def main() -> None:
    """Run the program on stdin and report how it ended."""
    report_fd, seconds, memory_mb = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    token, _, source = sys.stdin.buffer.read().partition(b"\n")
    _close_input()
    sys.argv = ["program"]
    _leave_network()
    _limit(seconds, memory_mb)
    sys.addaudithook(_guard(os.getcwd()))
    failure = _run(source.decode("utf-8", "surrogatepass"))
    report = f" 0 {failure}" if failure else " 1 passed"
    os.write(report_fd, b"\n" + token + report.encode("utf-8", "replace") + b"\n")
    os._exit(0)  # at once: a thread that the program left behind would be waited for


def _close_input() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _leave_network() -> None:
    """Move to an empty network namespace where the kernel lets an ordinary user do so."""
    try:
        if hasattr(os, "unshare"):  # Python 3.12
            os.unshare(_NEW_USER | _NEW_NETWORK)
        elif sys.platform == "linux":
            import ctypes

            ctypes.CDLL(None).unshare(_NEW_USER | _NEW_NETWORK)
    except OSError:
        pass  # the audit hook refuses sockets all the same
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        del sys.modules[name]


def _limit(seconds: float, memory_mb: int) -> None:
    memory = memory_mb * 2**20
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,  # for root it holds nothing back, the audit hook does
    }
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            # One second more to the hard limit of time, so that the signal says what it was.
            resource.setrlimit(kind, (value, value + (kind == resource.RLIMIT_CPU)))
        except (OSError, ValueError):
            if kind != resource.RLIMIT_AS:  # macOS knows no limit of address space
                raise


def _guard(folder: str) -> Callable[[str, tuple[object, ...]], None]:
    root, realpath, join, devnull = os.path.realpath(folder), os.path.realpath, os.sep, os.devnull

    def inside(path: object, folder: object = None) -> bool:
        if isinstance(path, int):  # a file that is open already
            return True
        name = os.fsdecode(path)  # type: ignore[arg-type]
        if isinstance(folder, int) and folder >= 0 and not name.startswith(join):
            name = f"/proc/self/fd/{folder}/{name}"
        return name == devnull or (realpath(name) + join).startswith(root + join)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITING
            if writes and not inside(path):
                raise PermissionError(f"the sandbox lets nothing write to {path!r}")
        elif event.startswith(_REFUSED):
            raise PermissionError(f"the sandbox does not allow {event}")
        elif event in _CHANGES:
            start = arguments[-1] if event in _WITH_FOLDER else None
            paths = [value for value in arguments if isinstance(value, (str, bytes, os.PathLike))]
            if not all(inside(path, start) for path in paths):
                raise PermissionError(f"the sandbox does not allow {event} outside its folder")

    return hook


def _run(source: str) -> str | None:
    """Return why the program did not reach its end, None if it did."""
    # A module of its own, because dataclasses look theirs up; and not __main__: what a program
    # does when it is started is not what is tested.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program", "exec"), module.__dict__)
    except MemoryError:
        return "out of memory"
    except BaseException as error:
        return _reason(error)
    return None


def _reason(error: BaseException) -> str:
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())[:200]
    except BaseException:  # its __str__ is the program's own
        text = ""
    return f"{name}: {text}" if text else name


if __name__ == "__main__":
    main()
