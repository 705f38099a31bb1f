"""The worker of a run of several processes, of which process 1 is killed after a chosen step.

    python -m tests.experiment.dying_worker RUN_DIR LAUNCHER

The step is in the environment as DIE_AFTER; without it nothing dies.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from furina.experiment.worker import main
from furina.training import LossHistory

kept = LossHistory.on_train_batch_end


def die(self: LossHistory, trainer: Any, *rest: Any) -> None:
    kept(self, trainer, *rest)
    if trainer.global_rank == 1 and str(trainer.global_step) == os.environ.get("DIE_AFTER"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    LossHistory.on_train_batch_end = die  # type: ignore[method-assign]
    main(Path(sys.argv[1]), int(sys.argv[2]))
