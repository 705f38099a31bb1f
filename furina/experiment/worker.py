"""One process of a run that several train: `launch` starts it, with a rank in its environment."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

from furina.experiment.processes.failures import note

LOOK = 0.5
"""Seconds between two checks that the launching process is still running."""


def main(run_dir: Path, launcher: int) -> None:
    """Train the run whose config is in `run_dir`, and exit when the process `launcher` exits."""
    end_with(launcher)
    try:
        from furina.experiment.config import RunConfig
        from furina.experiment.fit import fit_here
        from furina.progress import shown

        saved = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        with shown(sys.stdout):
            fit_here(RunConfig().updated(saved), run_dir)
    except Exception as error:
        note(error)
        sys.exit(1)


def end_with(launcher: int) -> None:
    """Exit this process when its launcher is gone, even if the launcher was killed."""

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
