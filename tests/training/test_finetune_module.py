from __future__ import annotations

import csv
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

import furina
from furina.errors import ConfigurationError, DataError
from furina.training import DivergedError, FinetuneModule, LossHistory, answer_loss
from furina.training.preconditions import refuse_ignored_options
from furina.training.schedule import learning_rate_factor, step_seed
from tests.training.helpers import RandomQuestions, fit, gradients, in_order, tiny, windows


class KeepGradients(pl.Callback):
    """Keep each step's unclipped gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.steps.append(gradients(pl_module.model))


def explicit_step_loss(model: Any, window: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return both sums of L = Σ_m (n_m / Σ n) L_task,m + Σ_m (t_m / Σ t) L_aux,m, as it reads."""
    n = [(batch["labels"] != -100).sum() for batch in window]
    t = [batch["attention_mask"].sum() for batch in window]
    task, auxiliary = torch.zeros(2, dtype=torch.float64).unbind()
    for batch, n_m, t_m in zip(window, n, t, strict=True):
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.double()
        log_p = logits[:, :-1].log_softmax(-1)
        targets, answer = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
        nll = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        task = task + n_m / sum(n) * (nll * answer).sum() / n_m
        auxiliary = auxiliary + t_m / sum(t) * furina.auxiliary_loss(model)
    return task, auxiliary


@pytest.mark.parametrize("method", ["furina", "lora"])
def test_step_is_the_token_weighted_formula_over_micro_batches(method: str, tmp_path: Path) -> None:
    module = FinetuneModule(tiny(method, "float64"), 1e-3, gradient_clip=None)
    kept, history = KeepGradients(), LossHistory()
    data = RandomQuestions(micro_batch_size=3)
    fit(module, tmp_path, data, max_steps=1, callbacks=[kept, history])

    model = tiny(method, "float64")
    task, auxiliary = explicit_step_loss(model, windows(1, micro_batch_size=3)[0])
    loss = task + auxiliary
    torch.autograd.backward(loss)
    assert history.training[0][1] == pytest.approx(loss.item(), rel=1e-6)
    assert history.auxiliary[0][1] == pytest.approx(auxiliary.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        # Llama's norms compute in fp32 in a float64 model too.
        torch.testing.assert_close(kept.steps[0][name], gradient, rtol=1e-4, atol=1e-7)


def test_micro_batches_differ_in_answer_and_real_tokens() -> None:
    window = windows(1, micro_batch_size=3)[0]
    for key, padding in (("labels", -100), ("attention_mask", 0)):
        assert len({int((batch[key] != padding).sum()) for batch in window}) > 1


def test_cut_into_micro_batches_does_not_change_the_task_gradient(tmp_path: Path) -> None:
    steps = []
    for size in (None, 1, 3):
        kept = KeepGradients()
        module = FinetuneModule(tiny("lora", "float64"), 1e-3, gradient_clip=None)
        fit(module, tmp_path, RandomQuestions(micro_batch_size=size), max_steps=1, callbacks=[kept])
        steps.append(kept.steps[0])
    for other in steps[1:]:
        torch.testing.assert_close(other, steps[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_plain_pytorch_loop_gives_bitwise_equal_losses_and_adapter(
    micro_batch_size: int | None, tmp_path: Path
) -> None:
    steps = 6
    module = FinetuneModule(tiny(dropout=0.1), 1e-2, weight_decay=0.1, warmup_steps=2)
    history = LossHistory()
    data = RandomQuestions(micro_batch_size=micro_batch_size)
    fit(module, tmp_path, data, max_steps=steps, callbacks=[history])

    model, losses = tiny(dropout=0.1), []
    optimizer = torch.optim.AdamW(furina.parameter_groups(model, 1e-2, 0.1), fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor("linear", step, steps, 2)
    )
    for step, window in enumerate(windows(steps, micro_batch_size=micro_batch_size)):
        torch.manual_seed(step_seed(0, step, 0))
        answers = [int((batch["labels"] != -100).sum()) for batch in window]
        tokens = [int(batch["attention_mask"].sum()) for batch in window]
        task = auxiliary = torch.zeros(())
        with furina.accumulating(model) if len(window) > 1 else nullcontext():
            for batch, n, t in zip(window, answers, tokens, strict=True):
                loss, _ = answer_loss(model, batch)
                loss, pull = n / sum(answers) * loss, t / sum(tokens) * furina.auxiliary_loss(model)
                torch.autograd.backward(loss + pull)
                task, auxiliary = task + loss.detach(), auxiliary + pull.detach()
        torch.nn.utils.clip_grad_norm_(furina.adapter_parameters(model).values(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append((step + 1, (task + auxiliary).item()))

    assert losses == history.training
    state = furina.adapter_state_dict(model)
    for name, tensor in furina.adapter_state_dict(module.model).items():
        assert torch.equal(tensor, state[name]), name


def test_checkpointed_gradients_equal_the_plain_ones_with_dropout(tmp_path: Path) -> None:
    kept, forwards = [], []
    for checkpointing in (False, True):
        model = tiny(dropout=0.3, dtype="float64")
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        calls: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        kept.append(KeepGradients())
        data = RandomQuestions(micro_batch_size=3)
        module = FinetuneModule(model, 1e-3, gradient_clip=None)
        fit(module, tmp_path, data, max_steps=2, callbacks=[kept[-1]])
        forwards.append(len(calls))
    assert forwards[1] == 2 * forwards[0]
    torch.testing.assert_close(kept[1].steps, kept[0].steps, rtol=1e-12, atol=1e-15)


def test_dropout_depends_on_seed_step_and_rank() -> None:
    seeds = {step_seed(*key) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(seeds) == 4


def test_gradient_is_clipped_by_its_global_norm_which_is_logged(tmp_path: Path) -> None:
    kept = KeepGradients()
    module = FinetuneModule(tiny(), 1e-3, gradient_clip=1e-3)
    run = fit(module, tmp_path, max_steps=1, callbacks=[kept])
    norm = torch.stack([g.norm() for g in kept.steps[0].values()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    assert run.logged_metrics["train/gradient_norm"] > 1e-2


@pytest.mark.parametrize(
    ("dtype", "precision"), [("bfloat16", "32-true"), ("float32", "bf16-true")]
)
def test_adapter_and_optimiser_state_are_fp32_beside_a_bf16_backbone(
    dtype: str, precision: str, tmp_path: Path
) -> None:
    module = FinetuneModule(tiny(dtype=dtype), 1e-3)
    run = fit(module, tmp_path, max_steps=1, precision=precision)
    backbone = module.model.get_submodule("lm_head")
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.bfloat16}
    adapter = furina.adapter_parameters(module.model).values()
    assert {parameter.dtype for parameter in adapter} == {torch.float32}
    moments = [
        state[key]
        for state in run.optimizers[0].state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]
    assert moments and {moment.dtype for moment in moments} == {torch.float32}


def test_one_dict_is_accepted_as_a_batch(tmp_path: Path) -> None:
    module = FinetuneModule(tiny(), 1e-3)
    batches = [window[0] for window in windows(3)]
    loader = in_order(batches)
    run = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    run.fit(module, loader)
    assert run.global_step == 3


def test_global_step_counts_optimiser_steps(tmp_path: Path) -> None:
    module = FinetuneModule(tiny(), 1e-3)
    run = fit(module, tmp_path, RandomQuestions(micro_batch_size=2), max_epochs=2)
    assert run.global_step == run.estimated_stepping_batches == 10


def test_training_reduces_the_loss_and_the_figures_are_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    module = FinetuneModule(tiny(), 1e-2, warmup_steps=2)
    history = LossHistory()
    run = fit(
        module,
        tmp_path,
        max_steps=20,
        logger=logger,
        log_every_n_steps=1,
        limit_val_batches=1.0,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        callbacks=[history],
    )
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    losses = [float(row["train/loss"]) for row in rows]
    assert len(losses) == 20 and losses[-1] < losses[0]
    assert [loss for _, loss in history.training] == pytest.approx(losses)
    running = [float(row["train/loss_running"]) for row in rows]
    assert running[-1] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    rates = [float(row["train/learning_rate"]) for row in rows]
    assert rates == pytest.approx(
        [1e-2 * learning_rate_factor("linear", step, 20, 2) for step in range(20)]
    )
    for row, loss in zip(rows, losses, strict=True):
        parts = float(row["train/loss_task"]) + float(row["train/loss_auxiliary"])
        assert parts == pytest.approx(loss, rel=1e-5)
    assert [step for step, _ in history.validation] == [10, 20]
    shown = run.progress_bar_metrics
    assert shown.keys() == {"train/loss_task", "train/loss_auxiliary", "validation/loss"}
    assert shown["train/loss_task"] == pytest.approx(float(rows[-1]["train/loss_task"]))


def test_validation_loss_is_the_token_weighted_mean(tmp_path: Path) -> None:
    model = tiny()
    run = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    results = run.validate(FinetuneModule(model, 1e-3), RandomQuestions(), verbose=False)
    with torch.no_grad():
        parts = [answer_loss(model.eval(), window[0]) for window in windows(3, batch_size=4)]
    expected = sum(loss * n for loss, n in parts) / sum(n for _, n in parts)
    assert results[0]["validation/loss"] == pytest.approx(float(expected), rel=1e-6)
    assert 0 <= results[0]["validation/accuracy"] <= 1


def test_model_trains_in_training_mode_though_loading_leaves_eval_mode(tmp_path: Path) -> None:
    model = tiny(dropout=0.5).eval()
    fit(FinetuneModule(model, 1e-3), tmp_path, max_steps=1)
    assert all(module.training for module in model.modules())


def test_ranks_that_hold_the_backbone_in_two_dtypes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broadcast(self: object, own: object, src: int = 0) -> object:
        return "torch.bfloat16" if own == "torch.float32" else own

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", broadcast)
    with pytest.raises(ConfigurationError, match=r"in torch.float32, rank 0 in torch.bfloat16"):
        fit(FinetuneModule(tiny(), 1e-3), tmp_path, max_steps=1)


def test_divergence_names_its_first_step_and_spares_the_adapter(tmp_path: Path) -> None:
    class Poison(pl.Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if run.global_step == 3:
                self.handle = module.model.model.norm.register_forward_hook(
                    lambda layer, args, output: output * float("nan")
                )

    module = FinetuneModule(tiny(), 1e-3)
    with pytest.raises(DivergedError, match="diverged at step 4") as caught:
        fit(module, tmp_path, max_steps=10, callbacks=[Poison()])
    assert caught.value.step == 4
    assert all(t.isfinite().all() for t in furina.adapter_state_dict(module.model).values())


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        ({"accumulate_grad_batches": 2}, "micro_batch_size"),
        ({"gradient_clip_val": 1.0}, "gradient_clip"),
        ({"limit_train_batches": 3, "max_steps": -1, "max_epochs": 4}, "set max_steps"),
        ({"overfit_batches": 1}, "data set of that size"),
    ],
)
def test_trainer_options_that_would_be_ignored_are_errors(
    options: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=advice):
        fit(FinetuneModule(tiny(), 1e-3), tmp_path, **{"max_steps": 1} | options)


def test_gradient_scaling_is_an_error() -> None:
    scaled = SimpleNamespace(
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        overfit_batches=0.0,
        gradient_clip_val=None,
        precision_plugin=SimpleNamespace(scaler=object()),
    )
    with pytest.raises(ConfigurationError, match="bf16-mixed"):
        refuse_ignored_options(cast("pl.Trainer", scaled))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"gradient_clip": 0.0}, "None for no clipping"),
        ({"schedule": "linaer"}, "Did you mean 'linear'"),
    ],
)
def test_settings_out_of_range_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        FinetuneModule(tiny(), **{"learning_rate": 1e-3, **settings})


def test_schedule_that_ends_before_training_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="learning rate of 0"):
        fit(FinetuneModule(tiny(), 1e-3, total_steps=5), tmp_path, max_steps=6)


def test_schedule_without_an_end_is_an_error_unless_constant(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="needs an end"):
        fit(FinetuneModule(tiny(), 1e-3), tmp_path, max_steps=-1, max_time={"seconds": 0})


def test_warm_up_longer_than_training_is_an_error_but_in_a_trial_run(tmp_path: Path) -> None:
    module = FinetuneModule(tiny(), 1e-3, warmup_steps=7, schedule="constant")
    with pytest.raises(ConfigurationError, match="warmup_steps=7 is more than the 6 steps"):
        fit(module, tmp_path, max_steps=6)
    assert fit(module, tmp_path, fast_dev_run=2).global_step == 2


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_step_of_a_schedule_has_a_positive_rate(schedule: Any) -> None:
    factors = [learning_rate_factor(schedule, step, 10, 3) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(0 < factor <= 1 for factor in factors)
    assert schedule == "constant" or factors[-1] < 0.2


def test_unadapted_and_merged_models_are_refused(tmp_path: Path) -> None:
    plain = furina.remove(tiny())
    with pytest.raises(ConfigurationError, match="no adapter"):
        FinetuneModule(plain, 1e-3)
    merged = tiny()
    furina.merge(merged)
    with pytest.raises(ConfigurationError, match=r"furina\.unmerge"):
        fit(FinetuneModule(merged, 1e-3), tmp_path, max_steps=1)


def test_step_without_an_answer_token_is_an_error(tmp_path: Path) -> None:
    batch = windows(1)[0][0]
    batch["labels"].fill_(-100)
    loader = in_order([batch])
    with pytest.raises(DataError, match="no answer token"):
        fit(FinetuneModule(tiny(), 1e-3), tmp_path, loader, max_steps=1)


def test_a_backbone_of_inference_mode_is_refused_before_training(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = tiny("lora")
    with pytest.raises(ConfigurationError, match="inference_mode"):
        fit(FinetuneModule(model, 1e-3), tmp_path, max_steps=1)
