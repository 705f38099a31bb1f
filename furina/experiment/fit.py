"""Fine-tune as a config says; a killed run goes on where its last checkpoint stands."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from furina.data.module import TaskDataModule
from furina.errors import ConfigurationError, FurinaError
from furina.experiment.config import RunConfig
from furina.experiment.measures import measured
from furina.experiment.process import adapted, optimiser_steps, run_backbone, run_data, train
from furina.experiment.processes.launch import launch, require_devices
from furina.experiment.processes.ranks import is_rank, leave, require_world, take_place
from furina.kernels.processor import best_device
from furina.model.checkpoint import load, save
from furina.model.compilation import require_backend
from furina.model.parameters import load_adapter_state_dict
from furina.progress import part, say
from furina.records import Training, codec
from furina.storage import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

K = TypeVar("K", dict[str, Any], list[Any])
PATIENCE = 3600
"""Seconds that other processes give rank 0 to measure and save what was trained."""


@dataclass(frozen=True)
class Fitted:
    """A fine-tuned model, the questions it was trained and validated on, and what it cost."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: TaskDataModule
    training: Training


def fit(config: RunConfig, run_dir: Path) -> Fitted:
    """Fine-tune into `run_dir`: `adapter/`, `training.json`, `config.json` and CSV logs.

    With several devices their processes do so, and this one, or each of them if torchrun has
    started them, loads what came out onto one device. A finished run is loaded, an interrupted one
    resumed bit for bit.

    Raises ConfigurationError if `run_dir` belongs to another config or the devices cannot share
    the run, DivergedError if it diverges, and FurinaError if a process dies.
    """
    config = config.resolved()
    _check(config)
    finished = run_dir / "training.json"
    was_finished = finished.exists()
    if not was_finished and config.world_size == 1:
        fitted = fit_here(config, run_dir)
        assert fitted is not None
        return fitted
    data = run_data(config)
    if not was_finished:
        if is_rank():
            fit_here(config, run_dir)
        else:
            _fit_by_others(config, run_dir, data)
        _await(finished)
    fitted = _finished(config, run_dir, data)
    if was_finished:
        say(f"{run_dir} holds this run, finished before: nothing was trained")
    return fitted


def fit_here(config: RunConfig, run_dir: Path) -> Fitted | None:
    """Train in this process, alone or as one of several; the first one measures and saves.

    It does so when the others have left, with the whole model on one device; they return None.
    """
    alone, sharded = config.world_size == 1, config.strategy == "fsdp"
    rank = 0 if alone else take_place()
    # A model that is sharded need not fit into a device: each takes its parts from the CPU.
    model, data = _prepared(config, None if sharded else best_device())
    if rank == 0:
        claim(config, run_dir)  # only now: a config that cannot run must not own the folder
    history = train(config, run_dir, model, data)
    peak = history.peak_memory_bytes
    if not alone:
        tensors, peak = leave(model, peak)
        if rank:
            return None
        if sharded:
            model = adapted(config, best_device())
            load_adapter_state_dict(model, tensors)
    training = measured(config, model, data, history, peak)
    save(model, run_dir / "adapter")
    write_json(run_dir / "training.json", asdict(training))
    (run_dir / "last.ckpt").unlink(missing_ok=True)
    return Fitted(model, data.tokenizer, data, training)


def claim(config: RunConfig, run_dir: Path) -> None:
    """Write the config into `run_dir`, or check that it is the one already there."""
    file = run_dir / "config.json"
    own = json.loads(json.dumps(config.to_dict()))
    if not file.exists():
        write_json(file, own)
        return
    saved = read_kept(file, dict)
    different = [
        f"{key}: {saved.get(key)} there, {own.get(key)} here"
        for key in sorted({**saved, **own})
        if saved.get(key) != own.get(key)
    ]
    there, here = saved.get("dtype"), own["dtype"]
    if len(different) == 1 and there != here:
        raise ConfigurationError(
            f"{run_dir} holds a run in {there}, and this would be in {here}: go on with --dtype "
            f"{there}, or choose another --run-dir."
        )
    if different:
        raise ConfigurationError(
            f"{run_dir} holds a run with other settings ({'; '.join(different)}): choose another "
            "--run-dir, or delete that folder."
        )


def read_kept(file: Path, kind: type[K]) -> K:
    """Return the `kind` that a run has kept in its folder; raises FurinaError if it is damaged."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, kind):
        raise FurinaError(f"{file} is damaged: delete {file.parent} and run the same again.")
    return value


def _check(config: RunConfig) -> None:
    """Refuse what can be refused without reading anything."""
    config.check_training()
    if config.compile:
        require_backend(config.compile)
    if is_rank():
        require_world(config.world_size)
    elif config.world_size > 1:
        require_devices(config)


def _fit_by_others(config: RunConfig, run_dir: Path, data: TaskDataModule) -> None:
    """Let processes of their own train; they find the config in the claimed folder."""
    data.setup("fit")  # what cannot be read is one process's error, before any starts
    is_new = not (run_dir / "config.json").exists()
    claim(config, run_dir)
    try:
        launch(config, run_dir)
    except ConfigurationError:  # a config that cannot run must not own the folder
        if is_new:
            (run_dir / "config.json").unlink(missing_ok=True)
            if not any(run_dir.iterdir()):
                run_dir.rmdir()
        raise


@part("loading the backbone and the data")
def _prepared(config: RunConfig, device: str | None) -> tuple[PreTrainedModel, TaskDataModule]:
    data = run_data(config)
    model = adapted(config, device)
    data.setup("fit")
    replace(config, steps=optimiser_steps(config, data), epochs=None).check_sizes()
    return model, data


def _finished(config: RunConfig, run_dir: Path, data: TaskDataModule) -> Fitted:
    claim(config, run_dir)
    model = run_backbone(config, best_device())
    load(run_dir / "adapter", model)
    data.setup("fit")
    file = run_dir / "training.json"
    saved = codec.decode(Training, read_kept(file, dict), str(file))
    return Fitted(model, data.tokenizer, data, saved)


def _await(file: Path) -> None:
    """Wait until rank 0, which may be on another machine, has written `file`."""
    end = time.monotonic() + PATIENCE
    while not file.exists():
        if time.monotonic() > end:
            raise FurinaError(
                f"{file} is not there {PATIENCE} s after the training: run the same command again."
            )
        time.sleep(0.5)
