"""Every way in which Lightning's Trainer uses a module works, or is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.tuner.tuning import Tuner

import furina
from furina.errors import ConfigurationError, DataError
from furina.training import DivergedError, FinetuneModule, LossHistory, ResumeCheckpoint
from tests.training.helpers import RandomQuestions, fit, in_order, tiny, trainer, windows


def validated(folder: Path, module: FinetuneModule, data: Any = None, **options: Any) -> float:
    run = trainer(folder, limit_val_batches=1.0)
    run.validate(module, data or RandomQuestions(), verbose=False, **options)
    return run.callback_metrics["validation/loss"].item()


@pytest.mark.parametrize("inference_mode", [True, False])
def test_validating_before_between_and_after_changes_no_loss(
    inference_mode: bool, tmp_path: Path
) -> None:
    seen = []
    for often in (False, True):
        module, history = FinetuneModule(tiny(dropout=0.1), 1e-2), LossHistory()
        run = trainer(
            tmp_path, max_steps=4, limit_val_batches=1.0, val_check_interval=2,
            check_val_every_n_epoch=None, inference_mode=inference_mode, callbacks=[history],
        )  # fmt: skip
        if often:
            validated(tmp_path, module)
            run.validate(module, RandomQuestions(), verbose=False)
        run.fit(module, RandomQuestions())
        if often:
            assert validated(tmp_path, module) == history.validation[-1][1]
        seen.append((history.training, history.validation))
    assert len(seen[0][1]) == 2 and seen[0] == seen[1]


def test_a_module_is_loaded_from_a_checkpoint_of_its_own_and_goes_its_own_way(
    tmp_path: Path,
) -> None:
    module = FinetuneModule(tiny(), 1e-2)
    fit(module, tmp_path, max_steps=2).save_checkpoint(tmp_path / "own.ckpt")
    loaded = FinetuneModule.load_from_checkpoint(tmp_path / "own.ckpt", model=tiny())
    assert loaded.hparams == module.hparams
    assert validated(tmp_path, loaded) == validated(tmp_path, module)
    other = FinetuneModule(tiny(), 1e-3)
    assert validated(tmp_path, other, ckpt_path=tmp_path / "own.ckpt") == validated(
        tmp_path, module
    )
    for each in (loaded, other):
        assert fit(each, tmp_path, max_steps=3).global_step == 3


def test_weights_only_checkpoints_are_loaded_but_not_gone_on_from(tmp_path: Path) -> None:
    module = FinetuneModule(tiny(), 1e-2)
    fit(module, tmp_path, max_steps=2).save_checkpoint(tmp_path / "w.ckpt", weights_only=True)
    loaded = FinetuneModule.load_from_checkpoint(tmp_path / "w.ckpt", model=tiny())
    assert validated(tmp_path, loaded) == validated(tmp_path, module)
    with pytest.raises(ConfigurationError, match=r"weights only.*load_from_checkpoint"):
        fit(FinetuneModule(tiny(), 1e-2), tmp_path, max_steps=3, ckpt_path=tmp_path / "w.ckpt")


def test_best_and_last_checkpoints_are_found(tmp_path: Path) -> None:
    saver = callbacks.ModelCheckpoint(tmp_path, monitor="validation/loss", save_last=True)
    module, history = FinetuneModule(tiny(), 1e-2), LossHistory()
    run = fit(module, tmp_path, max_epochs=3, limit_val_batches=1.0, callbacks=[history, saver])
    losses = [loss for _, loss in history.validation]
    for name, loss in (("best", min(losses)), ("last", losses[-1])):
        (found,) = run.validate(module, RandomQuestions(), ckpt_path=name, verbose=False)
        assert found["validation/loss"] == loss


@pytest.mark.parametrize("name", ["batch_size", "micro_batch_size"])
def test_a_batch_size_is_searched_and_then_trained_with(name: str, tmp_path: Path) -> None:
    data, module = RandomQuestions(batch_size=4, micro_batch_size=2), FinetuneModule(tiny(), 1e-3)
    start = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    run = trainer(tmp_path, max_epochs=1)
    Tuner(run).scale_batch_size(
        module, datamodule=data, max_trials=2, steps_per_trial=1,
        batch_arg_name=name,
    )  # fmt: skip
    assert getattr(data, name) == 4
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, start[key])
    run.fit(module, data)
    assert run.global_step == 44 // data.batch_size


@pytest.mark.parametrize(
    ("callback", "reason"),
    [
        (callbacks.EMAWeightAveraging(), "EMAWeightAveraging averages the frozen backbone"),
        (callbacks.WeightAveraging(), "averages the frozen backbone"),
        (callbacks.StochasticWeightAveraging(1e-3), "replaces the learning rate's schedule"),
        (callbacks.LearningRateFinder(), "one learning rate, where a method has several"),
        (callbacks.GradientAccumulationScheduler({0: 2}), "micro_batch_size"),
        (callbacks.BatchSizeFinder(), r"Tuner\(trainer\)\.scale_batch_size before fit"),
        (callbacks.ModelPruning("l1_unstructured"), "prunes the frozen backbone"),
        (callbacks.BackboneFinetuning(), "unfreeze them before fit"),
    ],
)
def test_a_callback_that_would_train_something_else_is_refused(
    callback: pl.Callback, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=reason) as caught:
        fit(FinetuneModule(tiny(), 1e-3), tmp_path, max_steps=1, callbacks=[callback])
    assert str(caught.value).count(". ") == 0


def test_a_search_of_the_learning_rate_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="compare short runs"):
        Tuner(trainer(tmp_path, max_steps=20)).lr_find(
            FinetuneModule(tiny(), 1e-3), RandomQuestions(), num_training=5
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("use", ["test", "predict"])
def test_what_the_module_does_not_do_says_what_does(use: str, tmp_path: Path) -> None:
    loader = in_order([window[0] for window in windows(1)])
    with pytest.raises(ConfigurationError, match=rf"Trainer\.{use} .* Trainer\.validate"):
        getattr(trainer(tmp_path), use)(FinetuneModule(tiny(), 1e-3), loader)


def test_compiling_the_whole_module_names_the_option_that_compiles(tmp_path: Path) -> None:
    compiled = torch.compile(FinetuneModule(tiny(), 1e-3), backend="eager")
    with pytest.raises(ConfigurationError, match="compile_backend="):
        fit(compiled, tmp_path, max_steps=1)  # type: ignore[arg-type]


def test_several_validation_loaders_have_one_mean_over_their_tokens(tmp_path: Path) -> None:
    batches = [window[0] for window in windows(3, batch_size=4)]
    module = FinetuneModule(tiny(), 1e-3)
    parts = [in_order(batches[:1]), in_order(batches[1:])]
    assert validated(tmp_path, module, parts) == validated(tmp_path, module, in_order(batches))


def test_validation_batches_without_an_answer_are_an_error(tmp_path: Path) -> None:
    batch = windows(1)[0][0]
    batch["labels"].fill_(-100)
    with pytest.raises(DataError, match="validation batches have no answer token"):
        validated(tmp_path, FinetuneModule(tiny(), 1e-3), in_order([batch]))


def test_a_second_fit_remembers_nothing_of_the_first(tmp_path: Path) -> None:
    module = FinetuneModule(tiny(), 1e-3)
    poisoned = module.model.model.norm.register_forward_hook(lambda *a: a[2] * float("nan"))
    with pytest.raises(DivergedError):
        fit(module, tmp_path, max_steps=1)
    poisoned.remove()
    fit(module, tmp_path, max_steps=2)
    history = LossHistory()
    run = fit(module, tmp_path, max_steps=2, callbacks=[history])
    mean = sum(loss for _, loss in history.training) / 2
    assert run.callback_metrics["train/loss_running"].item() == pytest.approx(mean, rel=1e-6)


class SwapOptimiser(pl.Callback):
    def on_train_start(self, run: Any, module: Any) -> None:
        own = furina.adapter_parameters(module.model).values()
        run.optimizers = [torch.optim.SGD(own, 1e-2)]


class Subclass(FinetuneModule):
    scheduled = True

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(furina.adapter_parameters(self.model).values(), 1.0)
        if not self.scheduled:
            return optimizer
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, 0.25, 100)]


class Unscheduled(Subclass):
    scheduled = False


def test_an_optimiser_without_this_runs_schedule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"leave trainer\.optimizers alone"):
        fit(FinetuneModule(tiny(), 1e-3), tmp_path, max_steps=1, callbacks=[SwapOptimiser()])
    with pytest.raises(ConfigurationError, match="return both from configure_optimizers"):
        fit(Unscheduled(tiny(), 1e-3), tmp_path, max_steps=1)


def test_a_subclass_trains_with_the_pair_that_it_returns(tmp_path: Path) -> None:
    start, module = tiny("lora"), Subclass(tiny("lora"), 1e-3, gradient_clip=1e-2)
    fit(module, tmp_path, max_steps=1)
    moved = [
        (after - before).detach().norm()
        for before, after in zip(
            furina.adapter_parameters(start).values(),
            furina.adapter_parameters(module.model).values(),
            strict=True,
        )
    ]
    assert torch.stack(moved).norm().item() == pytest.approx(0.25 * 1e-2, rel=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_going_on_with_other_batches_is_an_error(schedule: Any, tmp_path: Path) -> None:
    for steps, size in ((2, 8), (4, 4)):
        saver = ResumeCheckpoint(tmp_path / "last.ckpt", 1)
        module = FinetuneModule(tiny(), 1e-3, schedule=schedule, total_steps=4)
        options = {"max_steps": steps, "callbacks": [saver], "ckpt_path": saver.latest()}
        if size == 8:
            fit(module, tmp_path, RandomQuestions(8), **options)
            continue
        with pytest.raises(ConfigurationError, match="batches_per_epoch=5 and not 11"):
            fit(module, tmp_path, RandomQuestions(4), **options)
