"""A training run that kills itself with SIGKILL at a chosen moment; the resume test's child."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

import furina
from furina import storage
from furina.training import FinetuneModule, LossHistory, ResumeCheckpoint
from tests.training.helpers import RandomQuestions, tiny, trainer

STEPS = 16
INTERVAL = 3


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class PrintLosses(pl.Callback):
    """Append each step's loss, exactly, to a file that outlives the process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        with open(self.path, "a") as file:
            file.write(f"{run.global_step} {outputs['loss'].item().hex()}\n")


class KillAt(pl.Callback):
    """Die in optimiser step `step`: before it, inside its accumulation window, or after it."""

    def __init__(self, moment: str, step: int) -> None:
        self.moment, self.step, self.backwards = moment, step, 0

    def _now(self, run: Any, moment: str) -> bool:
        return moment == self.moment and run.global_step == self.step - (moment != "validation")

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.backwards = 0
        if self._now(run, "step"):
            die()

    def on_after_backward(self, run: Any, module: Any) -> None:
        self.backwards += 1
        if self._now(run, "window") and self.backwards == 2:
            die()

    def on_validation_batch_start(self, run: Any, *args: Any) -> None:
        if self._now(run, "validation"):
            die()


def die_while_writing(half_of_the_bytes: bool, write: int) -> None:
    """Kill the process inside its `write`-th checkpoint: half written, or before the rename."""
    writes = 0
    open_file, replace = os.fdopen, os.replace

    def open_half(handle: int, mode: str) -> Any:
        nonlocal writes
        writes += 1
        file = open_file(handle, mode)
        return HalfFile(file) if half_of_the_bytes and writes == write else file

    def replace_never(source: Any, target: Any) -> None:
        if not half_of_the_bytes and writes == write:
            die()
        replace(source, target)

    storage.os.fdopen, storage.os.replace = open_half, replace_never  # type: ignore[attr-defined]


class HalfFile:
    """A file in which only the first half of the bytes arrives."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __enter__(self) -> HalfFile:
        return self

    def __exit__(self, *args: object) -> None:
        self.file.close()

    def write(self, data: Any) -> None:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        die()


def run(folder: Path, moment: str | None = None, step: int = 0) -> None:
    """Train to the end or to death, from the checkpoint in `folder` if there is one."""
    torch.set_num_threads(1)
    resume, history = ResumeCheckpoint(folder / "last.ckpt", INTERVAL), LossHistory()
    callbacks: list[pl.Callback] = [resume, history, PrintLosses(folder / "losses.txt")]
    if moment in ("half", "unrenamed"):
        die_while_writing(moment == "half", write=step)
    elif moment is not None:
        callbacks.append(KillAt(moment, step))
    module = FinetuneModule(tiny(dropout=0.1), 1e-2, warmup_steps=2)
    fit = trainer(
        folder,
        max_steps=STEPS,
        callbacks=callbacks,
        limit_val_batches=1.0,
        val_check_interval=4,
        check_val_every_n_epoch=None,
    )
    fit.fit(module, RandomQuestions(micro_batch_size=3), ckpt_path=resume.latest())
    assert len(history.training) == STEPS
    torch.save(
        {
            "adapter": furina.adapter_state_dict(module.model),
            "validation": history.validation,
            "training": history.training,
            "auxiliary": history.auxiliary,
        },
        folder / "final.pt",
    )
