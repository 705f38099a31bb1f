"""Time `furina fit` beside a plain peft and transformers loop, end to end; the last line is JSON.

    python benchmarks/finetuning.py --results results/training
    python benchmarks/finetuning.py --backbone tiny-llama --rank 8 --steps 4 --rounds 1

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

import argparse
import contextlib
import csv
import gc
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from operator import truediv
from pathlib import Path
from statistics import fmean, median
from typing import Any

import peft
import torch
from command_line import command_line
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from training import spread
from training_report import _number
from training_variants import method_options, peft_model, synchronise

import furina
from furina.data.batches import IGNORED, Batch
from furina.data.items import data_hash
from furina.data.module import TaskDataModule
from furina.data.sources import load_items
from furina.errors import FurinaError
from furina.experiment.config import RunConfig
from furina.experiment.fit import fit
from furina.kernels.processor import best_device
from furina.records.environment import provenance
from furina.reporting.figures import plots
from furina.reporting.tables.cells import Row, build, label
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text
from furina.training.divergence import DivergedError
from furina.training.schedule import learning_rate_factor

PLAIN, AGAIN = "plain/peft_lora", "plain/peft_lora_again"
LORA, BUCKETED, FURINA = "furina/lora", "furina/lora_bucketed", "furina/furina"
ARMS = (PLAIN, AGAIN, LORA, BUCKETED, FURINA)
SHORT = {LORA: "lora", BUCKETED: "lora_bucketed", FURINA: "furina", AGAIN: "plain_again"}
"""What the ratios call the arms that are held against the plain loop."""
SAME_ROWS = (LORA, AGAIN)
"""The arms whose steps hold the rows of the plain loop's, so that their losses compare."""

Report = dict[str, Any]
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
        return self.tokens / self.seconds

    def costs(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "losses"}


Outcomes = dict[str, Outcome]
"""By arm, in the order in which they ran."""


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


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--task", default="openbookqa", help="$FURINA_DATA_DIR may hold its rows")
    parser.add_argument("--dtype", default="bfloat16")
    kinds = ("eager", "sdpa")
    parser.add_argument("--attention", choices=kinds, default="eager", help="of furina's arms")
    parser.add_argument("--plain-attention", choices=("default", *kinds), default="default")
    parser.add_argument("--steps", type=int, default=16, help="optimiser steps of a run")
    parser.add_argument("--batch-size", type=int, default=16, help="questions of a step")
    parser.add_argument("--bucket-steps", type=int, default=8, help="of the bucketed arms")
    parser.add_argument("--warmup-steps", type=int, default=5, help="of the learning rate")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=128, help="of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="folder for finetuning.json, .md and .svg")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.threads, options.experts) < 1:
        parser.error("--rounds, --threads and --experts must be at least 1")
    if options.rank % options.experts:
        parser.error("--experts must divide --rank")
    if not 0 < options.learning_rate < math.inf:
        parser.error("--learning-rate must be positive and finite")
    return options


def config_of(name: str, seed: int, options: argparse.Namespace) -> RunConfig:
    """Return what `furina fit` is told; a plain loop does what that of furina/lora says."""
    method = "furina" if name == FURINA else "lora"
    return RunConfig(
        backbone=options.backbone,
        method=method,
        adapter=method_options(method, options),
        task=options.task,
        steps=options.steps,
        batch_size=options.batch_size,
        bucket_steps=options.bucket_steps if name in (BUCKETED, FURINA) else 1,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        seed=seed,
        dtype=options.dtype,
        attention=options.attention,
        validation_size=0,
        checkpoint_interval=options.steps,  # only the one after the last step, which is not timed
    )


def run(name: str, number: int, options: argparse.Namespace) -> Outcome:
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


def plain(config: RunConfig, adapter_seed: int, options: argparse.Namespace) -> Outcome:
    """Load, train and save as a tutorial does, on the rows of `fit(config)` in their order."""
    start = time.perf_counter()
    tokenizer = furina.load_tokenizer(config.backbone)
    attention = None if options.plain_attention == "default" else options.plain_attention
    backbone = furina.load_backbone(config.backbone, config.dtype, best_device(), attention)
    chosen = argparse.Namespace(rank=options.rank, dropout=options.dropout, seed=adapter_seed)
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
    course: dict[str, int] = {"total_steps": config.steps, "warmup_steps": config.warmup_steps}
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


def measure(options: argparse.Namespace, command: str) -> Report:
    """Run all rounds; return the report."""
    for name in ARMS:  # what is wrong in any arm is said before the first one runs
        config = config_of(name, options.seed, options)
        config.check_tasks()
        config.adapter_config()
    torch.set_num_threads(options.threads)
    rng = random.Random(options.seed)
    rounds = []
    for number in range(options.rounds + 1):
        outcomes: Outcomes = {}
        for name in rng.sample(ARMS, k=len(ARMS)):
            outcomes[name] = run(name, number, options)
            speed = outcomes[name].tokens_per_second
            print(f"round {number}   {name:<22} {speed:7.0f} tokens/s", flush=True)
        if number:
            rounds.append(outcomes)
    return report_of(rounds, options, command)


def report_of(rounds: Sequence[Outcomes], options: argparse.Namespace, command: str) -> Report:
    """Return what is written."""
    environment = asdict(provenance())
    environment["packages"]["peft"] = peft.__version__
    speeds = {name: [arms[name].tokens_per_second for arms in rounds] for name in ARMS}
    losses = {name: [arms[name].losses for arms in rounds] for name in ARMS}
    return {
        "command": command,
        "settings": {key: value for key, value in vars(options).items() if key != "results"},
        "environment": environment,
        "data": data_hash(load_items(options.task, "train")),
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "ratios": {
            f"end_to_end/{short}/plain": median(map(truediv, speeds[name], speeds[PLAIN]))
            for name, short in SHORT.items()
        },
        "loss_differences": {
            f"loss/{SHORT[name]}_minus_plain": apart(losses[name], losses[PLAIN])
            for name in SAME_ROWS
        },
        "rounds": [
            {"seed": options.seed + number, "arms": {name: arms[name].costs() for name in arms}}
            for number, arms in enumerate(rounds, start=1)
        ],
        "losses": losses,
    }


def apart(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean and the largest absolute difference over the steps of all rounds."""
    pairs = zip(chain.from_iterable(one), chain.from_iterable(other), strict=True)
    differences = [a - b for a, b in pairs]
    return {"mean": fmean(differences), "max_abs": max(map(abs, differences))}


def markdown(report: Report) -> str:
    """Return the report's table, a row for each arm."""
    title = "Fine-tuning from end to end"
    table = build("finetuning", title, [_row(report, name) for name in ARMS], _remarks(report))
    return f"## {title}\n\n{render(table)}"


def _row(report: Report, name: str) -> Row:
    speed, short = report["tokens_per_second"][name], SHORT.get(name)
    ratio = report["ratios"].get(f"end_to_end/{short}/plain")
    difference = report["loss_differences"].get(f"loss/{short}_minus_plain", {})
    ran = [each["arms"][name] for each in report["rounds"]]
    padding = 1 - sum(arm["tokens"] for arm in ran) / sum(arm["positions"] for arm in ran)
    wall = median(arm["wall_seconds"] for arm in ran)
    last = fmean(curve[-1] for curve in report["losses"][name])
    return {
        ("", "arm"): label(name),
        ("tokens/s", "median"): _number(speed["median"], "{:.0f}"),
        ("tokens/s", "quartiles"): label(f"{speed['q1']:.0f} to {speed['q3']:.0f}"),
        ("tokens/s", "over the plain loop's"): _number(ratio, "{:.2f}"),
        ("", "padding"): _number(padding, "{:.1%}"),
        ("", "wall clock, s"): _number(wall, "{:.1f}"),
        ("", "trainable, M"): _number(ran[0]["trainable"], "{:.2f}", 1e-6),
        ("loss", "last"): _number(last, "{:.3f}"),
        ("loss minus the plain loop's", "mean"): _number(difference.get("mean"), "{:+.4f}"),
        ("loss minus the plain loop's", "largest"): _number(difference.get("max_abs"), "{:.4f}"),
    }


def _remarks(report: Report) -> tuple[str, ...]:
    settings, environment = report["settings"], report["environment"]
    hardware, packages = environment["hardware"], environment["packages"]
    names = ("torch", "transformers", "peft", "lightning")
    told = [f"{key.replace('_', ' ')}: {value}" for key, value in settings.items()]
    changed = " with uncommitted changes" if environment["dirty"] else ""
    return (
        "Tokens are real ones, timed from the first forward to the last update; a ratio is the "
        "median of the rounds' own. The wall clock, a median, holds loading and saving too.",
        "Losses are nats per answer token, without FURINA's selection loss: the mean of the last, "
        "and differences over the steps of all rounds, where they hold the same rows. "
        f"{AGAIN} is the plain loop from another start: noise.",
        f"{', '.join(told)}.",
        f"{hardware['accelerator'] or hardware['cpu']}, cores: {hardware['cores']}; "
        f"{', '.join(f'{name} {packages[name]}' for name in names)}; commit "
        f"{(environment['commit'] or 'unknown')[:10]}{changed}; data "
        f"{report['data'][:10]}. Made by {report['command']}.",
    )


def figure(report: Report) -> Figure:
    """Return the loss curves, a line for each arm: means over rounds."""
    with plots.style():
        drawn = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = drawn.add_subplot()
        for name, colour, marker in zip(ARMS, plots.COLOURS, plots.MARKERS, strict=False):
            curve = [fmean(step) for step in zip(*report["losses"][name], strict=True)]
            steps = range(1, len(curve) + 1)
            axes.plot(steps, curve, marker=marker, color=colour, markersize=4, label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimiser step", ylabel="loss, nats per answer token")
        axes.legend()
    return drawn


def write(report: Report, folder: Path) -> None:
    """Write finetuning.json, and finetuning.md and finetuning.svg made from it."""
    write_json(folder / "finetuning.json", report)
    write_text(folder / "finetuning.md", markdown(report))
    write_text(folder / "finetuning.svg", plots.svg(figure(report)))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        report = measure(options, command_line("finetuning.py", arguments))
        for key, value in (report["ratios"] | report["loss_differences"]).items():
            print(key, value)
        print(json.dumps(report))  # before the files: a full disk must not lose it
        if options.results:
            write(report, options.results)
    except FurinaError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
