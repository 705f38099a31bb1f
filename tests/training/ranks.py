"""Training runs on two processes, and the same on one; the children of test_ddp and test_fsdp."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from filelock import FileLock
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor

import furina
from furina.adapters import configure
from furina.training import FinetuneModule, LossHistory, ResumeCheckpoint, ShardedStrategy
from tests.training.golden import backbone, default
from tests.training.helpers import PROCESSES, RandomQuestions, fit

STEPS = 3
RATE = 1e-3
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": lambda: DDPStrategy(forward_sync_buffers=False),
    "fsdp": lambda: ShardedStrategy(2),
}


@dataclass(frozen=True)
class Case:
    """A method's training, in which its auxiliary loss is on and nothing is dropped.

    In float64, so that two orders of a sum stay apart from two different sums. Adam moves an entry
    by lr·g/(|g| + ε), so where a gradient is off by δ, an entry's step is off by lr·δ/ε at most.
    With ε = 1e-8, of a gradient that is no more than rounding fp32 makes a whole step, as
    δ = 2⁻²⁴ > ε. In float64 δ is about 1e-15, the rounding of a few products that sum to 1.
    """

    method: str
    micro: int | None = None
    dtype: str = "float64"
    checkpointing: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = (self.micro, self.dtype != "float64" and self.dtype, self.checkpointing and "ckpt")
        words = [str(part) for part in (*parts, *self.options.values()) if part]
        return "-".join([self.method, *words])

    def model(self) -> Any:
        """Return the tiny Llama in training mode with an adapter whose every tensor has moved."""
        model = backbone(self.dtype)
        options = {**default(self.method).to_dict(), "dropout": 0.0, **self.options}
        furina.adapt(model, configure(self.method, options), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in furina.adapter_parameters(model).values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.05 * noise)
        if self.checkpointing:
            model.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        return model.train()


def train(case: Case, folder: Path, **options: Any) -> dict[str, Any]:
    """Train `case` and return what it comes to."""
    model = case.model()
    start = copied(furina.adapter_state_dict(model))
    module = FinetuneModule(model, RATE, weight_decay=0.1)
    history = LossHistory()
    run = fit(
        module,
        folder,
        RandomQuestions(micro_batch_size=case.micro),
        callbacks=[history],
        **{**validated(), "max_steps": STEPS, **options},
    )
    return {
        "start": start,
        "adapter": copied(furina.adapter_state_dict(model)),
        "losses": history.training,
        "validation": history.validation,
        # Adam does not see a constant factor on all gradients; their norm does.
        "norm": run.callback_metrics["train/gradient_norm"],
    }


def validated() -> dict[str, Any]:
    """Return the Trainer's options with which every process validates all rows at the end."""
    return {
        "limit_val_batches": 1.0,
        "val_check_interval": STEPS,
        "check_val_every_n_epoch": None,
        "use_distributed_sampler": False,
    }


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def as_rank(rank: int, port: int) -> None:
    """Make this process one of two that torchrun seems to have started."""
    torch.set_num_threads(1)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    values = {**places, **meeting, "GROUP_RANK": 0, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ.update({key: str(value) for key, value in values.items()})


def parallel(strategy: str) -> dict[str, Any]:
    """Return the Trainer's options of a run on two processes."""
    return {"strategy": STRATEGIES[strategy](), "devices": 2, "inference_mode": False}


def train_all(rank: int, port: int, folder: Path, cases: Sequence[Case], strategy: str) -> None:
    """Train one case after the other as one of two processes."""
    as_rank(rank, port)
    for case in cases:
        made = train(case, folder, **parallel(strategy))
        torch.save(made, folder / f"{case}-{strategy}-rank{rank}.pt")


def on_two_ranks(
    work: Callable[..., None], folder: Path, *arguments: Any, wait: float = 600
) -> list[int | None]:
    """Run work(rank, port, folder, …) in two processes; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        PROCESSES.Process(target=work, args=(rank, port, folder, *arguments), daemon=True)
        for rank in range(2)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(wait)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """Return a folder that `make` fills once, however many test processes ask for it."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, made = root / name, root / name / "made"
    with FileLock(root / f"{name}.lock"):
        if not made.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            made.touch()
    return folder


def results(folder: Path, case: Case, strategy: str) -> list[dict[str, Any]]:
    """Return what the two processes made of a case."""
    return [torch.load(folder / f"{case}-{strategy}-rank{rank}.pt") for rank in range(2)]


LOSS = 1e-12  # a sum of some thousand terms in another order: 2⁻⁵³ for each
WAY = 1e-7  # δ/ε: what rounding makes of an entry's step


def assert_equal_runs(ours: dict[str, Any], theirs: dict[str, Any], exactly: bool = False) -> None:
    """Compare losses, the last gradient's norm, and how far the adapters have come."""
    rtol = 0.0 if exactly else LOSS
    for key in ("losses", "validation"):
        steps, losses = zip(*ours[key], strict=True)
        other_steps, other_losses = zip(*theirs[key], strict=True)
        assert steps == other_steps
        assert losses == pytest.approx(other_losses, rel=rtol), key
    torch.testing.assert_close(ours["norm"], theirs["norm"], rtol=rtol, atol=0)
    assert_same_way(ours["adapter"], theirs["adapter"], theirs["start"], 0 if exactly else WAY)


def assert_same_way(
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    start: dict[str, Tensor],
    rtol: float = WAY,
) -> None:
    """Hold the distance of two adapters against the way that each has come from `start`."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        apart, way = (tensor - theirs[name]).norm(), (theirs[name] - start[name]).norm()
        assert apart <= rtol * way, (name, apart, way)


class KillRank(pl.Callback):
    """Kill process 1 before optimiser step `step`, counted from 1."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if run.global_rank == 1 and run.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGKILL)


RESUMED = Case("furina", micro=3)
LAST = 6


def run_to(last: int, folder: Path, **options: Any) -> tuple[FinetuneModule, LossHistory]:
    """Train to step `last`, from the checkpoint of `folder` if there is one; one comes every 2."""
    resume, history = ResumeCheckpoint(folder / "last.ckpt", 2), LossHistory()
    module = FinetuneModule(RESUMED.model(), RATE, warmup_steps=2, total_steps=LAST)
    callbacks = [history, *options.pop("callbacks", []), resume]
    data = RandomQuestions(micro_batch_size=options.pop("micro", RESUMED.micro))
    more: dict[str, Any] = {"max_steps": last, "ckpt_path": resume.latest(), **options}
    fit(module, folder, data, callbacks=callbacks, **more)
    return module, history


def run_alone(folder: Path) -> tuple[FinetuneModule, LossHistory]:
    """Train in one process, whose micro-batches are those of both ranks together."""
    return run_to(LAST, folder, micro=2 * 3)


def resumed(
    rank: int, port: int, folder: Path, strategy: str, die_before: int | None
) -> FinetuneModule:
    """Train as one of two processes, to the end or to the death of one; rank 0 keeps the result."""
    as_rank(rank, port)
    kills: list[pl.Callback] = [] if die_before is None else [KillRank(die_before)]
    module, history = run_to(LAST, folder, callbacks=kills, **parallel(strategy))
    whole = copied(furina.adapter_state_dict(module.model))
    if rank == 0:
        model = RESUMED.model()
        furina.load_adapter_state_dict(model, whole)
        furina.save(model, folder / "adapter")
        torch.save(history.training, folder / "losses.pt")
    return module


def kill_and_resume(work: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    """Run `resumed`, or what calls it, until one process is killed, and again to the end."""
    first, second = on_two_ranks(work, folder, *arguments, 4)
    assert second == -signal.SIGKILL and first != 0
    assert not (folder / "adapter").exists()
    assert torch.load(folder / "last.ckpt")["global_step"] == 2
    assert on_two_ranks(work, folder, *arguments, None) == [0, 0]


def assert_same_losses(ours: list[tuple[int, float]], theirs: list[tuple[int, float]]) -> None:
    assert [step for step, _ in ours] == [step for step, _ in theirs] == list(range(1, LAST + 1))
    for (_, loss), (_, other) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other, rel=LOSS)
