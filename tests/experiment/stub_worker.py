"""A worker that trains nothing: it does what RUN_DIR/behaviour.json says for its rank.

One that fails waits until the other of two has begun: that one would be ended before it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from furina import errors
from furina.experiment import worker
from furina.experiment.processes.failures import note


class Diverged(errors.FurinaError):
    """Has what the real error has, whose module takes seconds to import."""

    step = 7


Diverged.__name__ = "DivergedError"
RANK = os.environ["RANK"]
folder = Path(sys.argv[1])


def other_when_begun() -> int:
    """Return the pid of the other of two processes, once it has begun."""
    file = folder / f"rank{1 - int(RANK)}.json"
    while not file.exists() or not file.read_text().endswith("}"):
        time.sleep(0.001)
    pid: int = json.loads(file.read_text())["pid"]
    return pid


def is_dead(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return "Z (zombie)" in status


def behave(what: str, value: str) -> None:
    if what in ("crash", "exit", "die"):
        other_when_begun()
    if what == "raise":
        kind = Diverged if value == "DivergedError" else getattr(errors, value)
        note(kind(f"{value} said."))
        sys.exit(1)
    if what == "crash":
        try:
            raise TypeError(value)
        except TypeError as error:
            note(error)
            sys.exit(3)
    if what == "miss":  # the other process, and say so when it is gone
        other = other_when_begun()
        while not is_dead(other):
            time.sleep(0.001)
        behave("crash", value)
    if what == "exit":
        print(f"first line\nsecond line\n\n{value}", file=sys.stderr)
        sys.exit(3)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":  # as for a process that is gone
        time.sleep(float(value))


if __name__ == "__main__":
    worker.end_with(int(sys.argv[2]))
    print(f"rank {RANK} was here")
    (folder / f"rank{RANK}.json").write_text(json.dumps({"pid": os.getpid(), **os.environ}))
    plan = json.loads((folder / "behaviour.json").read_text())
    behave(*plan.get(RANK, ["end", ""]))
