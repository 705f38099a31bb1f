"""Two processes under DDP train what one does, whatever the method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import furina
from furina.adapters import methods
from tests.training.golden import backbone
from tests.training.ranks import (
    RESUMED,
    Case,
    assert_equal_runs,
    assert_same_losses,
    assert_same_way,
    kill_and_resume,
    made_once,
    on_two_ranks,
    results,
    resumed,
    run_alone,
    train,
    train_all,
)

CASES = [*(Case(method) for method in methods()), Case("lora", micro=3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases trained by one pair of processes."""

    def make(folder: Path) -> None:
        assert on_two_ranks(train_all, folder, CASES, "ddp") == [0, 0]

    return made_once(tmp_path_factory, "ddp", make)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_equal_one_process_with_the_same_global_batch(
    case: Case, folder: Path, tmp_path: Path
) -> None:
    first, second = results(folder, case, "ddp")
    assert_equal_runs(first, second, exactly=True)
    # A loss over micro-batches is that over the whole batch, unless it has an auxiliary part.
    assert_equal_runs(first, train(Case(case.method), tmp_path))


def test_a_run_that_lost_a_process_goes_on_to_what_one_process_trains(tmp_path: Path) -> None:
    kill_and_resume(resumed, tmp_path, "ddp")
    (tmp_path / "alone").mkdir()
    module, history = run_alone(tmp_path / "alone")
    assert_same_losses(torch.load(tmp_path / "losses.pt"), history.training)
    model = furina.load(tmp_path / "adapter", backbone("float64"))
    states = (furina.adapter_state_dict(each) for each in (model, module.model, RESUMED.model()))
    assert_same_way(*states)
