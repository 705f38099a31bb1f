"""Two processes with a sharded model train, save and resume what one does with a whole one."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule

import furina
from furina.adapters import methods
from furina.errors import ConfigurationError
from furina.kernels.sharding import is_sharded
from furina.training import FinetuneModule, LossHistory, ShardedStrategy
from furina.training.preconditions import refuse_unsharded_options
from furina.training.sharding import shard
from tests.training.golden import backbone
from tests.training.helpers import trainer, windows
from tests.training.ranks import (
    RESUMED,
    Case,
    assert_equal_runs,
    assert_same_losses,
    assert_same_way,
    copied,
    kill_and_resume,
    made_once,
    on_two_ranks,
    results,
    resumed,
    run_alone,
    train,
    train_all,
)

CASES = [
    *(Case(method) for method in methods()),
    Case("lora", micro=3),
    Case("lora", options={"rank": 1}),  # of whose A one of two processes has nothing
    Case("furina", checkpointing=True),
    Case("furina", options={"start": "subtract"}),
    Case("furina", options={"activity": "l1"}),
    Case("pissa", options={"in_place": True}),
]
MIXED = Case("furina", dtype="bfloat16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases trained by one pair of processes."""

    def make(folder: Path) -> None:
        assert on_two_ranks(train_all, folder, [*CASES, MIXED], "fsdp") == [0, 0]

    return made_once(tmp_path_factory, "fsdp", make)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_ranks_equal_one_process_with_the_same_global_batch(
    case: Case, folder: Path, tmp_path: Path
) -> None:
    first, second = results(folder, case, "fsdp")
    assert_equal_runs(first, second, exactly=True)
    alone = train(Case(case.method, options=case.options), tmp_path)
    assert all(torch.equal(first["start"][name], alone["start"][name]) for name in alone["start"])
    assert_equal_runs(first, alone)


def test_fp32_parameters_are_trained_beside_bf16_weights(folder: Path, tmp_path: Path) -> None:
    first, second = results(folder, MIXED, "fsdp")
    assert_equal_runs(first, second, exactly=True)
    assert {tensor.dtype for tensor in first["adapter"].values()} == {torch.float32}
    alone = train(MIXED, tmp_path)
    # Before the first step: what Adam makes of bf16's rounding is no small part of the later ones.
    assert first["losses"][0][1] == pytest.approx(alone["losses"][0][1], rel=2**-8)
    # Two that went ways of their own would be √2 of the way apart.
    assert_same_way(first["adapter"], alone["adapter"], alone["start"], 0.5)


def sharded_run(rank: int, port: int, folder: Path, die_before: int | None) -> None:
    """Train as one of two processes, to the end or to the death of one, and look at the model."""
    module = resumed(rank, port, folder, "fsdp", die_before)
    assert all(map(is_sharded, module.model.parameters()))
    groups = [part for part in module.model.modules() if isinstance(part, FSDPModule)]
    assert groups == [module.model, *module.model.model.layers]
    module.configure_model()  # a second time, as for another fit or a validation
    for use in (furina.merge, lambda model: furina.save(model, folder / f"never{rank}")):
        with pytest.raises(ConfigurationError, match="is sharded over several devices: gather"):
            use(module.model)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes of which one is killed, and that then goes on to the end."""
    make = partial(kill_and_resume, sharded_run)
    return made_once(tmp_path_factory, "killed-fsdp", make)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[FinetuneModule, LossHistory]:
    return run_alone(tmp_path_factory.mktemp("alone"))


def test_a_killed_run_goes_on_as_if_it_had_never_been_sharded(
    killed: Path, alone: tuple[FinetuneModule, LossHistory]
) -> None:
    assert_same_losses(torch.load(killed / "losses.pt"), alone[1].training)


def test_the_saved_adapter_is_the_one_of_a_single_process_and_merges(
    killed: Path, alone: tuple[FinetuneModule, LossHistory]
) -> None:
    model = furina.load(killed / "adapter", backbone("float64"))
    start, single = RESUMED.model(), alone[0].model
    states = (copied(furina.adapter_state_dict(each)) for each in (model, single, start))
    assert_same_way(*states)
    batch = {key: windows(1)[0][0][key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        before = model.eval()(**batch).logits
        furina.merge(model)
        after = model(**batch).logits
    torch.testing.assert_close(after, before, rtol=1e-10, atol=1e-10)


def test_one_process_goes_on_with_the_checkpoint_of_two(
    alone: tuple[FinetuneModule, LossHistory], tmp_path: Path
) -> None:
    assert on_two_ranks(sharded_run, tmp_path, 6)[1] == -signal.SIGKILL
    assert torch.load(tmp_path / "last.ckpt")["global_step"] == 4
    assert_same_losses(run_alone(tmp_path)[1].training, alone[1].training)


@pytest.mark.parametrize(
    ("options", "compiled", "said"),
    [
        ({"strategy": ModelParallelStrategy()}, False, "use furina.training.ShardedStrategy"),
        ({"strategy": ShardedStrategy(2), "inference_mode": False}, True, "leave out compile"),
        ({"strategy": ShardedStrategy(2)}, False, r"set Trainer\(inference_mode=False\)"),
    ],
)
def test_what_a_sharded_model_does_not_allow_is_refused(
    options: dict[str, Any], compiled: bool, said: str, tmp_path: Path
) -> None:
    run = trainer(tmp_path, devices=2, **options)
    with pytest.raises(ConfigurationError, match=said):
        refuse_unsharded_options(run, compiled)


def test_a_model_without_named_layers_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Linear names no decoder layer"):
        shard(torch.nn.Linear(2, 2), mesh=None)  # type: ignore[arg-type]
