"""Time `furina fit` beside a plain peft and transformers loop, end to end; the last line is JSON.

    python -m benchmarks.training.finetuning --results results/training
    python -m benchmarks.training.finetuning --backbone tiny-llama --rank 8 --steps 4 --rounds 1

`plain/peft_lora` is what a tutorial writes: rows padded to the longest of their batch, the model's
own loss over the logits of all tokens, clipping, an AdamW that is not fused. `furina/lora` is
`furina fit` on the very same rows in the same order. The other two sort the rows of some steps by
length, as experiments/quickstart does; their steps hold other rows.

Seconds run from the first forward to the end of the last optimiser update, so loading, saving and
checkpoints do not count; tokens are real ones. Wall-clock seconds are of the whole call: loading,
saving and, in `furina fit`, one checkpoint too. No question is held out, so nothing is validated.

Every round runs all arms once in random order. Its seed decides the order of the questions, the
same for all arms, and the initial adapter; `plain/peft_lora_again` starts from another one: how far
it is from the first is noise. A ratio is the median over rounds of two speeds of one round. A step
of each arm warms up beforehand.
"""

from __future__ import annotations

import contextlib
import csv
import gc
import math
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import furina
from benchmarks.common.command import Parser, Report, described, run
from benchmarks.common.models import method_options, peft_model
from benchmarks.common.rounds import interleaved, quotients, spread, synchronise
from benchmarks.training import finetuning_page
from benchmarks.training.finetuning_page import (
    AGAIN,
    ARMS,
    BUCKETED,
    FURINA,
    PLAIN,
    SAME_ROWS,
    SHORT,
)
from furina.data.batches import IGNORED, Batch
from furina.data.items import data_hash
from furina.data.module import TaskDataModule
from furina.data.sources import load_items
from furina.experiment.config import RunConfig
from furina.experiment.fit import fit
from furina.kernels.processor import best_device
from furina.training.divergence import DivergedError
from furina.training.schedule import learning_rate_factor

Rows = Sequence[Batch]
"""The questions of a step with their answers, each alone and without padding."""


@dataclass(frozen=True)
class Outcome:
    """What one arm did in one round; `losses` are nats per answer token of each step.

    `tokens` are real ones, `positions` those with padding; `seconds` are of the steps alone and
    `wall_seconds` of everything.
    """

    seconds: float
    wall_seconds: float
    tokens: int
    positions: int
    trainable: int
    losses: list[float]

    @property
    def tokens_per_second(self) -> float:
        """The speed of the steps."""
        return self.tokens / self.seconds

    def costs(self) -> dict[str, Any]:
        """Return everything but the losses."""
        return {key: value for key, value in asdict(self).items() if key != "losses"}


Outcomes = dict[str, list[Outcome]]
"""Each arm's rounds."""


@contextlib.contextmanager
def step_times(steps: int) -> Iterator[list[float]]:
    """Yield a list that gets the time of the first forward and of the end of every update.

    It uses torch's own hooks, so a loop that takes no callback is timed like any other.
    """
    times: list[float] = []

    def note(*call: object) -> None:
        if len(times) in (0, steps):  # a device may not have done yet what it was asked
            synchronise()
        times.append(time.perf_counter())

    def begin(*call: object) -> None:
        forward.remove()  # it would slow down every later forward
        note()

    forward = register_module_forward_pre_hook(begin)
    update = register_optimizer_step_post_hook(note)
    try:
        yield times
    finally:
        forward.remove()
        update.remove()
    assert len(times) == steps + 1, "not every step was timed, or something else was"


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone dtype rank experts rounds threads seed results", rounds=3)
    made.add_argument("--task", default="openbookqa", help="$FURINA_DATA_DIR may hold its rows")
    kinds = ("eager", "sdpa")
    made.add_argument("--attention", choices=kinds, default="eager", help="of furina's arms")
    made.add_argument("--plain-attention", choices=("default", *kinds), default="default")
    made.add_argument("--steps", type=int, default=16, help="optimiser steps of a run")
    made.add_argument("--batch-size", type=int, default=16, help="questions of a step")
    made.add_argument("--bucket-steps", type=int, default=8, help="of the bucketed arms")
    made.add_argument("--warmup-steps", type=int, default=5, help="of the learning rate")
    made.add_argument("--learning-rate", type=float, default=5e-4)
    made.add_argument("--dropout", type=float, default=0.0)
    options = made.checked(arguments, "rounds threads experts")
    if not 0 < options.learning_rate < math.inf:
        made.error("--learning-rate must be positive and finite")
    return options


def config_of(name: str, seed: int, options: Namespace) -> RunConfig:
    """Return what `furina fit` is told; a plain loop does what that of furina/lora says."""
    method = "furina" if name == FURINA else "lora"
    same = ("backbone", "task", "steps", "batch_size", "learning_rate", "warmup_steps", "dtype")
    return RunConfig(
        **{key: getattr(options, key) for key in same},
        attention=options.attention,
        method=method,
        adapter=method_options(method, options),
        bucket_steps=options.bucket_steps if name in (BUCKETED, FURINA) else 1,
        seed=seed,
        validation_size=0,
        checkpoint_interval=options.steps,  # only the one after the last step, which is not timed
    )


def run_arm(name: str, options: Namespace, number: int) -> Outcome:
    """Run one arm of round `number`, counted from 1; round 0 is a single step to warm up."""
    seed, first = options.seed + number, {"steps": 1, "warmup_steps": 0}
    config = config_of(name, seed, options).updated({} if number else first)
    gc.collect()  # a trainer refers to itself, so the last arm's model may still be there
    if name not in (PLAIN, AGAIN):
        return ours(config)
    # No round's seed, so no adapter starts as another one.
    adapter_seed = seed if name == PLAIN else seed + options.rounds + 1
    return plain(config, adapter_seed, options)


def ours(config: RunConfig) -> Outcome:
    """Run `furina fit` into a folder that is thrown away."""
    assert config.steps
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(sys.stderr),  # its progress bar
        step_times(config.steps) as times,
    ):
        fitted = fit(config, Path(folder))
        wall = time.perf_counter() - start
        losses = task_losses(Path(folder) / "logs" / "metrics.csv")
    batches = fitted.data.train_dataloader()
    masks = [m["attention_mask"] for step in range(config.steps) for m in batches.window(step)]
    return Outcome(
        seconds=times[-1] - times[0],
        wall_seconds=wall,
        tokens=sum(int(mask.sum()) for mask in masks),
        positions=sum(mask.numel() for mask in masks),
        trainable=fitted.training.trainable,
        losses=losses,
    )


def task_losses(metrics: Path) -> list[float]:
    """Return each step's loss as `fit` logged it, without FURINA's selection loss."""
    with metrics.open(newline="", encoding="utf-8") as file:
        cells = (row["train/loss_task"] for row in csv.DictReader(file))
        return [float(cell) for cell in cells if cell]


def plain(config: RunConfig, adapter_seed: int, options: Namespace) -> Outcome:
    """Load, train and save as a tutorial does, on the rows of `fit(config)` in their order."""
    assert config.steps
    start = time.perf_counter()
    tokenizer = furina.load_tokenizer(config.backbone)
    attention = None if options.plain_attention == "default" else options.plain_attention
    backbone = furina.load_backbone(config.backbone, config.dtype, best_device(), attention)
    chosen = Namespace(rank=options.rank, dropout=options.dropout, seed=adapter_seed)
    model: Any = peft_model("peft_lora", backbone, chosen).train()
    names = ("batch_size", "bucket_steps", "validation_size", "seed", "max_length")
    same: dict[str, Any] = {name: getattr(config, name) for name in names}
    data = TaskDataModule(tokenizer, config.task, config.protocol, **same)
    data.setup("fit")
    batches = data.train_dataloader()
    steps = [unpadded(batches.window(step)) for step in range(config.steps)]
    with step_times(config.steps) as times:
        losses = train(model, steps, data.pad_id, config)
    with tempfile.TemporaryDirectory() as folder:
        # Whether the embedding has changed would be looked up on the hub.
        model.save_pretrained(folder, save_embedding_layers=False)
    lengths = [[len(row["input_ids"]) for row in rows] for rows in steps]
    return Outcome(
        seconds=times[-1] - times[0],
        wall_seconds=time.perf_counter() - start,
        tokens=sum(map(sum, lengths)),
        positions=sum(len(own) * max(own) for own in lengths),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        losses=losses,
    )


def unpadded(window: Sequence[Batch]) -> Rows:
    """Return the rows of one step, from whatever micro-batches it has. Shape: (tokens,) each."""
    return [
        {key: tensor[row, :length] for key, tensor in micro.items()}
        for micro in window
        for row, length in enumerate(micro["attention_mask"].sum(1).tolist())
    ]


def pad(rows: Rows, pad_id: int) -> Batch:
    """Pad to the longest row. Shape: (rows, tokens) each."""
    fills = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    return {
        key: pad_sequence([row[key] for row in rows], batch_first=True, padding_value=fill)
        for key, fill in fills.items()
    }


def train(model: nn.Module, steps: Sequence[Rows], pad_id: int, config: RunConfig) -> list[float]:
    """Train on each step's rows in a plain loop; return each step's loss.

    Raises DivergedError at the first loss that is not finite.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay)
    course: dict[str, int] = {"total_steps": len(steps), "warmup_steps": config.warmup_steps}
    scheduler = LambdaLR(optimizer, partial(learning_rate_factor, config.schedule, **course))
    device = parameters[0].device
    losses: list[Tensor] = []
    for rows in steps:
        batch = {key: tensor.to(device) for key, tensor in pad(rows, pad_id).items()}
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(parameters, config.gradient_clip or math.inf)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    found = [loss.item() for loss in losses]
    if bad := [number for number, value in enumerate(found, 1) if not math.isfinite(value)]:
        raise DivergedError(bad[0])
    return found


def measure(options: Namespace, command: str) -> Report:
    """Run all rounds; return the report."""
    for name in ARMS:  # what is wrong in any arm is said before the first one runs
        config = config_of(name, options.seed, options)
        config.check_tasks()
        config.adapter_config()
    torch.set_num_threads(options.threads)
    runs = {name: partial(run_arm, name, options) for name in ARMS}
    outcomes = interleaved(runs, options.rounds + 1, random.Random(options.seed))
    return report_of({name: own[1:] for name, own in outcomes.items()}, options, command)


def report_of(outcomes: Outcomes, options: Namespace, command: str) -> Report:
    """Return what is written."""
    speeds = {name: [each.tokens_per_second for each in own] for name, own in outcomes.items()}
    losses = {name: [each.losses for each in own] for name, own in outcomes.items()}
    return {
        **described(options, command, peft=peft.__version__),
        "data": data_hash(load_items(options.task, "train")),
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "ratios": {
            f"end_to_end/{short}/plain": median(quotients(speeds[name], speeds[PLAIN]))
            for name, short in SHORT.items()
        },
        "loss_differences": {
            f"loss/{SHORT[name]}_minus_plain": apart(losses[name], losses[PLAIN])
            for name in SAME_ROWS
        },
        "rounds": [
            {
                "seed": options.seed + number,
                "arms": {name: own[number - 1].costs() for name, own in outcomes.items()},
            }
            for number in range(1, options.rounds + 1)
        ],
        "losses": losses,
    }


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean and the largest absolute difference over the steps of all rounds."""
    pairs = zip(chain.from_iterable(one), chain.from_iterable(other), strict=True)
    differences = [a - b for a, b in pairs]
    return {"mean": fmean(differences), "max_abs": max(map(abs, differences))}


main = partial(run, "training.finetuning", parse, measure, "finetuning", finetuning_page.page)

if __name__ == "__main__":
    main()
