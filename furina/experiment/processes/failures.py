"""Tell the launching process, through a file, why a training process failed."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furina import errors
from furina.errors import FurinaError
from furina.storage import write_text

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAST_LINES = 3
"""Lines of a failed process's output that its message ends with."""
TOGETHER = 10
"""Seconds within which the other processes fail once one has; the launcher kills them later."""


def note(error: BaseException) -> None:
    """Write `error` to the file that torchelastic reads, if torchelastic started this process."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    noted = {
        "message": f"{type(error).__name__}: {error}",
        "timestamp": int(time.time()),
        "kind": type(error).__name__,
        "sentence": str(error),
        "step": getattr(error, "step", None),
        "traceback": "".join(traceback.format_exception(error)),
    }
    Path(file).write_text(json.dumps(noted), encoding="utf-8")


def failure(
    failures: Mapping[int, ProcessFailure], output: Mapping[int, str], log: Path
) -> FurinaError:
    """Return the error of the process that failed first.

    An error of furina's own is returned as it was raised. Any other error, or a killed process,
    becomes one sentence that ends with the last lines of the process's `output`; the whole output
    goes to `log`.
    """
    known = (_restored(each.error_file_data) for each in failures.values())
    error = next((each for each in known if each is not None), None)
    if error is not None:
        return error
    rank = _first(failures)
    text = failures[rank].error_file_data.get("traceback") or output.get(rank, "")
    write_text(log, text)
    lines = [line.strip() for line in text.splitlines() if line.strip()][-LAST_LINES:]
    said = f": {' | '.join(lines)}" if lines else ""
    return FurinaError(
        f"Training process {rank} {_ended(failures[rank].exitcode)}{said} (all of it is in {log}); "
        "the same command goes on from the last checkpoint."
    )


def _first(failures: Mapping[int, ProcessFailure]) -> int:
    """Return the process whose failure made the others fail.

    When a process is killed, the others fail too and may write their errors earlier. The launcher
    ends the rest with SIGTERM, and with SIGKILL if that is not enough.
    """
    began = min(each.timestamp for each in failures.values())

    def order(rank: int) -> tuple[bool, bool, int]:
        each = failures[rank]
        by_launcher = each.exitcode == -signal.SIGTERM or each.timestamp > began + TOGETHER
        return by_launcher, each.exitcode >= 0, each.timestamp

    return min(failures, key=order)


def _restored(noted: Mapping[str, Any]) -> FurinaError | None:
    """Return the error that was written to the file if it is furina's own, else None."""
    from furina.training import CheckpointError, DivergedError

    kind = noted.get("kind")
    if kind == DivergedError.__name__:
        return DivergedError(noted["step"])
    own = {CheckpointError.__name__: CheckpointError, **vars(errors)}.get(str(kind))
    if not (isinstance(own, type) and issubclass(own, FurinaError)):
        return None
    return own(noted["sentence"])


def _ended(exitcode: int) -> str:
    if exitcode < 0:
        return f"was ended by {signal.Signals(-exitcode).name}"
    return f"failed with exit code {exitcode}"
