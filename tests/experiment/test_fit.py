"""Fitting leaves a whole run behind, loads a finished one, and resumes a killed one bit for bit."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

from furina import adapter_state_dict, cli, describe
from furina.errors import ConfigurationError, DataError, FurinaError
from furina.experiment import fit as fit_module
from furina.experiment import process
from furina.experiment.config import SCORING
from furina.experiment.fit import fit
from furina.progress import shown
from furina.training import FinetuneModule, LossHistory, ResumeCheckpoint
from tests.experiment.conftest import Finished
from tests.experiment.helpers import tiny


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def adapter_bytes(run_dir: Path) -> bytes:
    return (run_dir / "adapter" / "furina_adapter.safetensors").read_bytes()


@contextmanager
def killed_after_step(step: int) -> Iterator[None]:
    kept = LossHistory.on_train_batch_end

    def die(self: LossHistory, trainer: Any, *rest: Any) -> None:
        kept(self, trainer, *rest)
        if trainer.global_step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(LossHistory, "on_train_batch_end", die)
        yield


@contextmanager
def killed_while_saving() -> Iterator[None]:
    save = fit_module.save

    def save_and_die(*arguments: Any) -> None:
        save(*arguments)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fit_module, "save", save_and_die)
        yield


@contextmanager
def trained_steps() -> Iterator[list[int]]:
    kept, steps = LossHistory.on_train_batch_end, list[int]()

    def note(self: LossHistory, trainer: Any, *rest: Any) -> None:
        steps.append(trainer.global_step)
        kept(self, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossHistory, "on_train_batch_end", note)
        yield steps


def test_a_finished_run_leaves_adapter_record_and_config_but_no_checkpoint(
    finished: Finished,
) -> None:
    names = {path.name for path in finished.run_dir.iterdir()}
    assert names == {"adapter", "training.json", "config.json", "logs"}
    assert {path.name for path in (finished.run_dir / "adapter").iterdir()} == {
        "furina_config.json",
        "furina_adapter.safetensors",
    }
    assert json.loads((finished.run_dir / "config.json").read_text()) == finished.config.to_dict()


def test_what_was_measured_is_that_of_the_run(finished: Finished) -> None:
    config, training = finished.config, finished.fitted.training
    assert [step for step, _ in training.loss_curve] == list(range(1, config.steps + 1))
    assert [step for step, _ in training.validation_curve] == [3, 6]
    assert training.final_loss == training.loss_curve[-1][1]
    assert [step for step, _ in training.auxiliary_curve] == list(range(1, config.steps + 1))
    assert all(value > 0 for _, value in training.auxiliary_curve)
    counts = describe(finished.fitted.model)
    assert (training.trainable, training.total) == (counts.trainable, counts.total)
    assert training.seconds > 0 and training.peak_memory_bytes > 0
    data = finished.fitted.data
    train, validation = data.train_items["arc_easy"], data.validation_items["arc_easy"]
    assert len(validation) == config.validation_size
    assert not {q.id for q in train} & {q.id for q in validation}


def test_furina_records_its_gradient_ratio_and_selection(finished: Finished) -> None:
    training = finished.fitted.training
    assert training.gradient_ratio is not None and training.gradient_ratio > 0
    assert training.selection is not None and training.selection.keys() == {"top_k_share"}
    # The K most active of R experts never have less than K/R of the activity.
    assert 2 / 3 <= training.selection["top_k_share"] < 1


def test_lora_has_neither(data_dir: str, tmp_path: Path) -> None:
    training = fit(tiny(data_dir, "lora", steps=1, validation_size=0), tmp_path).training
    assert training.gradient_ratio is None and training.selection is None
    assert training.validation_curve == ()


def test_a_finished_run_is_loaded_and_gives_the_same(finished: Finished) -> None:
    with trained_steps() as steps:
        again = fit(finished.config, finished.run_dir)
    assert steps == []
    assert again.training == finished.fitted.training
    assert again.data.train_items == finished.fitted.data.train_items
    assert again.data.validation_items == finished.fitted.data.validation_items
    torch.testing.assert_close(
        dict(adapter_state_dict(again.model)),
        dict(adapter_state_dict(finished.fitted.model)),
        rtol=0,
        atol=0,
    )


def test_another_config_in_the_same_folder_is_one_sentence(finished: Finished) -> None:
    other = finished.config.updated({"steps": 7, "adapter": {"rank": 3}})
    before = adapter_bytes(finished.run_dir)
    with pytest.raises(
        ConfigurationError, match=r"settings \(adapter: .*; steps: 6 there, 7 here\)"
    ) as caught:
        fit(other, finished.run_dir)
    assert str(finished.run_dir) in str(caught.value) and "\n" not in str(caught.value)
    assert adapter_bytes(finished.run_dir) == before


def test_a_run_in_another_dtype_says_how_to_go_on(finished: Finished) -> None:
    other = finished.config.updated({"dtype": "bfloat16"})
    says = "holds a run in float32, and this would be in bfloat16: go on with --dtype float32"
    with pytest.raises(ConfigurationError, match=says):
        fit(other, finished.run_dir)


@pytest.mark.parametrize("name", ["config.json", "training.json"])
@pytest.mark.parametrize("content", [b'{"steps": 6', b"\xff\x00", b"[]"])
def test_a_damaged_file_of_a_run_is_one_sentence(
    finished: Finished, tmp_path: Path, name: str, content: bytes
) -> None:
    shutil.copytree(finished.run_dir, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(FurinaError, match=rf"{name} is damaged: delete .* and run the same again"):
        fit(finished.config, tmp_path / "run")


def test_sizes_that_only_the_epochs_show_to_be_idle_leave_the_folder_alone(
    data_dir: str, tmp_path: Path
) -> None:
    config = tiny(data_dir, steps=None, epochs=1, validation_interval=8)
    with pytest.raises(ConfigurationError, match=r"validation_interval=8 .* steps=7 of the run"):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_base_has_nothing_to_fit(data_dir: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nothing to fit"):
        fit(tiny(data_dir, "base"), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("step", "left"), [(1, list(range(1, 7))), (3, [3, 4, 5, 6]), (5, [5, 6])])
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bytes(
    finished: Finished, tmp_path: Path, step: int, left: list[int]
) -> None:
    with killed_after_step(step):
        fit(finished.config, tmp_path)
    assert not (tmp_path / "training.json").exists()
    with trained_steps() as steps:
        training = fit(finished.config, tmp_path).training
    assert steps == left
    assert adapter_bytes(tmp_path) == adapter_bytes(finished.run_dir)
    assert training.loss_curve == finished.fitted.training.loss_curve
    assert training.validation_curve == finished.fitted.training.validation_curve
    assert training.gradient_ratio == finished.fitted.training.gradient_ratio
    assert training.selection == finished.fitted.training.selection


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_that_goes_on_says_from_where_and_nothing_else(
    finished: Finished, tmp_path: Path, step: int
) -> None:
    with killed_after_step(step) if step < 6 else killed_while_saving():
        fit(finished.config, tmp_path)
    stream = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, shown(stream, lambda: 0.0):
        warnings.simplefilter("always")
        fit(finished.config, tmp_path)
    assert stream.getvalue() == f"  training: resumed at step {step - step % 2} of 6\n"
    assert not [str(w.message) for w in caught if "is not empty" in str(w.message)]
    assert (tmp_path / "logs" / "metrics.1.csv").is_file(), "the log of the part before is lost"


def test_a_finished_run_says_that_nothing_was_trained(finished: Finished) -> None:
    stream = io.StringIO()
    with shown(stream, lambda: 0.0):
        fit(finished.config, finished.run_dir)
    says = f"  {finished.run_dir} holds this run, finished before: nothing was trained\n"
    assert stream.getvalue() == says


def test_a_fresh_run_says_neither(data_dir: str, tmp_path: Path) -> None:
    stream = io.StringIO()
    with shown(stream, lambda: 0.0):
        fit(tiny(data_dir, "lora", steps=1), tmp_path)
    assert stream.getvalue() == ""


def test_the_command_that_fit_names_next_works_as_it_stands(
    data_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(data_dir, "lora", steps=1).to_dict()
    file, run_dir = tmp_path / "run.yaml", tmp_path / "a folder"
    file.write_text(yaml.safe_dump({k: v for k, v in config.items() if k not in SCORING}))
    assert cli.main(["fit", "--config", str(file), "--run-dir", str(run_dir)]) == 0
    program, *words = shlex.split(capsys.readouterr().out.partition("next: ")[2])
    assert program == "furina"
    assert cli.main(words) == 0
    assert "arc_easy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"batch_size": 8}, r"data\.batch_size=4 and not 8"),
        ({"micro_batch_size": 1}, r"data\.micro_batch_size=2 and not 1"),
        ({"validation_size": 5}, r"data\.train_rows=26 and not 25"),
    ],
)
def test_a_trainer_that_goes_on_with_other_batches_is_an_error(
    data_dir: str, tmp_path: Path, changes: dict[str, Any], difference: str
) -> None:
    saver = ResumeCheckpoint(tmp_path / "last.ckpt", 1)
    for steps, config in ((1, tiny(data_dir)), (2, tiny(data_dir, **changes))):
        module = FinetuneModule(process.adapted(config, "cpu"), 1e-3, schedule="constant")
        trainer = Trainer(
            accelerator="cpu", max_steps=steps, callbacks=[saver], logger=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        data = process.run_data(config)
        if steps == 1:
            trainer.fit(module, data)
            continue
        with pytest.raises(ConfigurationError, match=difference):
            trainer.fit(module, data, ckpt_path=saver.latest())


def test_a_run_killed_while_it_is_saved_trains_no_step_again(
    finished: Finished, tmp_path: Path
) -> None:
    with killed_while_saving():
        fit(finished.config, tmp_path)
    with trained_steps() as steps:
        training = fit(finished.config, tmp_path).training
    assert steps == []
    assert adapter_bytes(tmp_path) == adapter_bytes(finished.run_dir)
    assert training.loss_curve == finished.fitted.training.loss_curve


def test_a_run_whose_items_cannot_be_read_leaves_its_folder_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="There is no folder"):
        fit(tiny(str(tmp_path / "empty"), "lora"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("chosen", "expected"), [(None, "eager"), ("sdpa", "sdpa")])
def test_attention_is_switched_only_where_none_was_chosen(
    data_dir: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: str | None,
    expected: str,
) -> None:
    seen: list[str] = []

    def train(config: object, run_dir: Path, model: Any, data: object) -> None:
        seen.append(model.config._attn_implementation)
        raise Killed

    monkeypatch.setattr(process, "_train", train)
    for module in (fit_module, process):
        monkeypatch.setattr(module, "best_device", lambda: "cpu")
    with pytest.raises(Killed):
        fit(tiny(data_dir, attention=chosen), tmp_path)
    assert seen == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "inducter"}, "inducter.*inductor"),
        ({"compile": "eager", "gradient_checkpointing": True}, "leave out gradient_checkpointing"),
    ],
)
def test_a_compilation_that_cannot_be_is_refused_before_the_folder_is_claimed(
    data_dir: str, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        fit(tiny(data_dir, **options), tmp_path)
    assert not list(tmp_path.iterdir())
