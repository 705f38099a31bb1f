from __future__ import annotations

import os
import pickle
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

import furina
from furina.errors import ConfigurationError, FurinaError
from furina.training import (
    AtomicCheckpointIO,
    CheckpointError,
    DivergedError,
    FinetuneModule,
    LossHistory,
    ResumeCheckpoint,
)
from tests.training.helpers import fit, tiny


@pytest.fixture
def trained(tmp_path: Path) -> FinetuneModule:
    module = FinetuneModule(tiny(), 1e-3)
    fit(module, tmp_path, max_steps=2, callbacks=[ResumeCheckpoint(tmp_path / "last.ckpt", 2)])
    return module


def test_checkpoint_holds_the_adapter_its_optimiser_and_progress_but_no_backbone(
    trained: FinetuneModule, tmp_path: Path
) -> None:
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    adapter = furina.adapter_state_dict(trained.model)
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in adapter}
    assert {"optimizer_states", "lr_schedulers", "loops", "furina"} < set(checkpoint)
    size = sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())
    moments = 2 * size
    names_and_progress = 200_000
    assert (tmp_path / "last.ckpt").stat().st_size < size + moments + names_and_progress
    backbone = sum(p.numel() * p.element_size() for p in trained.model.parameters()) - size
    assert backbone > names_and_progress


def test_the_time_in_training_has_no_checkpoint_and_no_validation_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("furina.training.history.time.perf_counter", lambda: now[0])

    def takes(seconds: float, call: Any) -> Any:
        def slow(*args: Any, **options: Any) -> Any:
            now[0] += seconds
            return call(*args, **options)

        return slow

    for name, seconds in (("training_step", 1.0), ("validation_step", 100.0)):
        monkeypatch.setattr(FinetuneModule, name, takes(seconds, getattr(FinetuneModule, name)))
    monkeypatch.setattr(
        AtomicCheckpointIO, "save_checkpoint", takes(10_000.0, AtomicCheckpointIO.save_checkpoint)
    )
    history = LossHistory()
    module = FinetuneModule(tiny(), 1e-3)
    saver = ResumeCheckpoint(tmp_path / "last.ckpt", 2)
    fit(module, tmp_path, max_steps=5, callbacks=[history, saver], val_check_interval=2)
    assert now[0] > 30_000 and history.seconds == len(history.training) == 5
    state = torch.load(saver.path, weights_only=True)["callbacks"]["LossHistory"]
    assert state["seconds"] == 5


def test_the_peak_of_memory_is_that_of_all_parts_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(peak: int) -> int:
        monkeypatch.setattr("furina.training.history.peak_memory_bytes", lambda: peak)
        history, saver = LossHistory(), ResumeCheckpoint(tmp_path / "last.ckpt", 2)
        fit(
            FinetuneModule(tiny(), 1e-3), tmp_path, max_steps=4,
            callbacks=[history, saver], ckpt_path=saver.latest(),
        )  # fmt: skip
        return history.peak_memory_bytes

    assert part(700) == 700
    assert part(30) == 700  # killed after its last step
    assert part(900) == 900


def test_a_plain_model_checkpoint_of_lightning_holds_the_adapter_only_too(
    tmp_path: Path,
) -> None:
    module = FinetuneModule(tiny(), 1e-3)
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="step")
    fit(module, tmp_path, max_steps=1, callbacks=[saver])
    state = torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"]
    assert len(state) == len(furina.adapter_state_dict(module.model))


def test_loading_into_another_shape_of_adapter_is_one_sentence(trained: FinetuneModule) -> None:
    with pytest.raises(ConfigurationError, match="not those of this adapter"):
        FinetuneModule(tiny("lora"), 1e-3).load_state_dict(trained.state_dict())


def test_killed_write_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def fail(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}


def test_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(FurinaError, match="disk is full"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, tmp_path / "last.ckpt")
    assert not list(tmp_path.iterdir())


class Foreign:
    """Something that only a free unpickler would make."""


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", pickle.dumps(Foreign())])
def test_damaged_or_foreign_checkpoints_are_never_unpickled(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or was not written"):
        AtomicCheckpointIO().load_checkpoint(path)


def plain(value: Any) -> Any:
    """Return a checkpoint with every tensor as its numbers."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def test_a_changed_bit_is_refused_wherever_it_changes_a_value(
    trained: FinetuneModule, tmp_path: Path
) -> None:
    path, whole = tmp_path / "last.ckpt", (tmp_path / "last.ckpt").read_bytes()
    draw, refused = random.Random(0), 0
    expected = AtomicCheckpointIO().load_checkpoint(path)
    for _ in range(60):
        place = draw.randrange(len(whole))
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]
        )
        try:
            loaded = AtomicCheckpointIO().load_checkpoint(path)
        except CheckpointError:
            refused += 1
            continue
        assert plain(loaded) == plain(expected)  # the bit lay between the archive's entries
    assert refused > 45


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.999])
def test_a_checkpoint_that_is_cut_short_is_refused(
    trained: FinetuneModule, tmp_path: Path, kept: float
) -> None:
    path = tmp_path / "last.ckpt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(CheckpointError, match="is damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_object_inside_a_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": Foreign()}, path)
    with pytest.raises(CheckpointError):
        AtomicCheckpointIO().load_checkpoint(path)


def test_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none.ckpt")


def test_asking_for_free_unpickling_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="weights_only=True"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)


def test_leftovers_of_killed_writes_are_removed(tmp_path: Path) -> None:
    leftover = tmp_path / ".last.ckpt.abcd"
    leftover.write_bytes(b"half")
    callback = ResumeCheckpoint(tmp_path / "last.ckpt", 1)
    fit(FinetuneModule(tiny(), 1e-3), tmp_path, max_steps=1, callbacks=[callback])
    assert not leftover.exists()
    assert callback.latest() == tmp_path / "last.ckpt"


def test_interval_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        ResumeCheckpoint(tmp_path / "last.ckpt", 0)


def test_diverged_state_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = FinetuneModule(tiny(), 1e-3)
    module._watch.note(7, torch.tensor(float("nan")))
    with pytest.raises(DivergedError, match="step 7"):
        module.on_save_checkpoint({})
