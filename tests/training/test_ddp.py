from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import furina
from furina.training import FinetuneModule, LossHistory
from tests.training.helpers import PROCESSES, RandomQuestions, fit, tiny

STEPS = 3


def train(folder: Path, method: str, micro_batch_size: int | None, **options: Any) -> None:
    torch.set_num_threads(1)
    module = FinetuneModule(tiny(method, "float64"), 1e-3, weight_decay=0.1)
    history = LossHistory()
    data = RandomQuestions(micro_batch_size=micro_batch_size)
    run = fit(module, folder, data, max_steps=STEPS, callbacks=[history], **options)
    assert run.global_step == STEPS
    state = {
        "adapter": furina.adapter_state_dict(module.model),
        "losses": history.training,
        # Adam does not see a constant factor on all gradients; their norm does.
        "norm": run.callback_metrics["train/gradient_norm"],
    }
    torch.save(state, folder / f"rank{run.global_rank}.pt")


def train_rank(rank: int, port: int, folder: Path, method: str, micro: int | None) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        GLOO_SOCKET_IFNAME="lo",
    )
    train(folder, method, micro, strategy="ddp", devices=2)


def train_on_two_ranks(folder: Path, method: str, micro: int | None) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        PROCESSES.Process(target=train_rank, args=(rank, port, folder, method, micro), daemon=True)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_equal_runs(ours: dict[str, Any], theirs: dict[str, Any], rtol: float) -> None:
    assert [step for step, _ in ours["losses"]] == [step for step, _ in theirs["losses"]]
    for (_, loss), (_, other) in zip(ours["losses"], theirs["losses"], strict=True):
        assert loss == pytest.approx(other, rel=1e-6)
    torch.testing.assert_close(ours["norm"], theirs["norm"], rtol=1e-5, atol=0)
    torch.testing.assert_close(ours["adapter"], theirs["adapter"], rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("method", ["furina", "lora", "flylora", "mixlora"])
def test_two_ranks_equal_one_process_with_the_same_global_batch(
    method: str, tmp_path: Path
) -> None:
    ranks = train_on_two_ranks(tmp_path, method, None)
    assert_equal_runs(ranks[0], ranks[1], rtol=0)
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", method, None)
    assert_equal_runs(ranks[0], torch.load(tmp_path / "one" / "rank0.pt"), rtol=1e-5)


def test_accumulation_on_two_ranks_weighs_tokens_as_one_process_does(tmp_path: Path) -> None:
    ranks = train_on_two_ranks(tmp_path, "lora", 3)
    assert_equal_runs(ranks[0], ranks[1], rtol=0)
    (tmp_path / "one").mkdir()
    train(tmp_path / "one", "lora", None)
    assert_equal_runs(ranks[0], torch.load(tmp_path / "one" / "rank0.pt"), rtol=1e-5)
