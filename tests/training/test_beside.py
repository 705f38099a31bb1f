"""What a user unfreezes beside the adapter is trained, checkpointed and resumed, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from furina.errors import ConfigurationError
from furina.model.state import state_of
from furina.training import FinetuneModule, LossHistory, ResumeCheckpoint
from tests.training.helpers import fit, tiny

HEAD = "model.embed_tokens.weight"
"""The head, which this model ties to its embeddings."""


def with_head(**options: Any) -> Any:
    model = tiny("lora", **options)
    model.lm_head.weight.requires_grad_()
    return model


def test_an_unfrozen_head_is_trained_at_the_plain_rate_without_decay(tmp_path: Path) -> None:
    model = with_head()
    start = model.lm_head.weight.detach().clone()
    module = FinetuneModule(model, 1e-2, weight_decay=0.5, lora_plus_ratio=16)
    run = fit(module, tmp_path, max_steps=2)
    group = run.optimizers[0].param_groups[-1]
    assert group["names"] == [HEAD] and group["params"][0] is model.lm_head.weight
    assert (group["initial_lr"], group["weight_decay"]) == (1e-2, 0.0)
    assert not torch.equal(model.lm_head.weight, start)


def test_the_gradient_of_an_unfrozen_head_is_part_of_the_clipped_norm(tmp_path: Path) -> None:
    norms = []
    for model in (tiny("lora"), with_head()):
        run = fit(FinetuneModule(model, 1e-3), tmp_path, max_steps=1)
        norms.append(run.logged_metrics["train/gradient_norm"])
    head = model.lm_head.weight.grad.norm()
    assert norms[1] > 1.01 * norms[0] and head < 1  # after clipping to 1 in all


def test_a_resumed_run_has_the_head_of_the_uninterrupted_one(tmp_path: Path) -> None:
    seen = []
    for stops in ((6,), (3, 6)):
        saver = ResumeCheckpoint(tmp_path / f"{len(stops)}.ckpt", 3)
        for stop in stops:
            history, model = LossHistory(), with_head(dropout=0.1)
            module = FinetuneModule(model, 1e-2, total_steps=6)
            fit(
                module, tmp_path, max_steps=stop, callbacks=[history, saver],
                ckpt_path=saver.latest(),
            )  # fmt: skip
        seen.append((history.training, model.lm_head.weight))
    assert not torch.equal(seen[0][1], tiny("lora").lm_head.weight)
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])


def test_going_on_without_the_head_or_with_it_anew_is_an_error(tmp_path: Path) -> None:
    for first, then in ((with_head, tiny), (tiny, with_head)):
        saver = ResumeCheckpoint(tmp_path / f"{first.__name__}.ckpt", 1)
        for make, steps in ((first, 1), (then, 2)):
            model = make("lora") if make is tiny else make()
            module = FinetuneModule(model, 1e-3, total_steps=2)
            options = {"max_steps": steps, "callbacks": [saver], "ckpt_path": saver.latest()}
            if make is first:
                fit(module, tmp_path, **options)
                continue
            with pytest.raises(ConfigurationError, match=f"trained_beside=.*'{HEAD}'"):
                fit(module, tmp_path, **options)


def test_a_state_without_the_head_is_refused_and_changes_nothing() -> None:
    module = FinetuneModule(with_head(), 1e-3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in before.items() if HEAD not in name}
    with pytest.raises(ConfigurationError, match=f"no {HEAD} of shape"):
        module.load_state_dict(other)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_cannot_be_trained_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="small updates vanish"):
        fit(FinetuneModule(with_head(dtype="bfloat16"), 1e-3), tmp_path, max_steps=1)
    model = tiny("lora")
    next(iter(state_of(model).layers.values())).base.weight.requires_grad_()
    with pytest.raises(ConfigurationError, match="freeze the weight"):
        fit(FinetuneModule(model, 1e-3), tmp_path, max_steps=1)
