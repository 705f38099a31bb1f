"""Invented records of a small suite, made from a seed: they drive the tests and measure nothing."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from furina.records import (
    Backbone,
    Data,
    Hardware,
    Latency,
    Merge,
    Provenance,
    RunRecord,
    Score,
    SearchRecord,
    SelectionRecord,
    Spread,
    Training,
    Variant,
)

TASKS = {"arc_easy": (600, 0.25), "openbookqa": (500, 0.25)}
SKILL = {
    ("base", "arc_easy"): 0.51,
    ("lora", "arc_easy"): 0.64,
    ("furina", "arc_easy"): 0.66,
    ("base", "openbookqa"): 0.28,
    ("lora", "openbookqa"): 0.33,
    ("furina", "openbookqa"): 0.34,
}
SLOWNESS = {"lora": 1.32, "furina": 1.41}
TRAINABLE = {"lora": 39_075_840, "furina": 39_283_200}
CONFIG = {"dtype": "bfloat16"}
PROVENANCE = Provenance(
    python="3.11.7",
    packages={"torch": "2.13.0", "lm_eval": "0.4.13"},
    commit="0123456789abcdef0123456789abcdef01234567",
    dirty=False,
    hardware=Hardware("Example CPU", 2, 2, 16 * 10**9, None),
)


def training(method: str, task: str, seed: int) -> Training:
    random_ = random.Random(f"{method} {task} {seed}")
    start, end = (1.9, 1.2) if task == "arc_easy" else (2.4, 2.0)
    curve = tuple(
        (step, end + (start - end) * math.exp(-step / 20) + random_.gauss(0, 0.12))
        for step in range(1, 61)
    )
    return Training(
        steps=60,
        seconds=280.0 + random_.uniform(0, 40),
        peak_memory_bytes=1_900_000_000,
        trainable=TRAINABLE[method],
        trainable_without_router=TRAINABLE[method],
        total=134_515_008 + TRAINABLE[method],
        final_loss=curve[-1][1],
        loss_curve=curve,
        gradient_ratio=0.21 if method == "furina" else None,
        selection={"top_k_share": 0.41} if method == "furina" else None,
    )


def correct(method: str, task: str, seed: int, flips: int = 0) -> list[bool]:
    """Return invented right and wrong answers; the same questions are easy for all methods."""
    difficulty, luck = random.Random(task), random.Random(f"{method} {task} {seed}")
    answers = []
    for _ in range(TASKS[task][0]):
        skill = SKILL[method, task] + 0.35 * difficulty.uniform(-1, 1)
        answers.append(luck.random() < skill)
    return [not a if i < flips else a for i, a in enumerate(answers)]


def score(variant: Variant, task: str, answers: Sequence[bool], samples: str | None) -> Score:
    n, chance = len(answers), TASKS.get(task, (0, 0.25))[1]
    value = sum(answers) / n
    stderr = math.sqrt(value * (1 - value) / (n - 1))
    return Score(
        variant=variant,
        task=task,
        protocol="text",
        protocol_version="1",
        metric="acc",
        value=value,
        stderr=stderr,
        n=n,
        chance=chance,
        suspect=value <= chance + 2 * stderr,
        engine="shared",
        first_prompt_sha256="c" * 64,
        first_prompt_ids=(1, 2, 3),
        truncated=0,
        lm_eval="0.4.13",
        samples=samples,
    )


def latency(method: str, task: str, seed: int) -> tuple[Latency, ...]:
    random_ = random.Random(f"{method} {task} {seed} latency")
    factors = {"base": 1.0}
    if method != "base":
        factors |= {"unmerged": SLOWNESS[method], "merged": 1.0}

    def spread(middle: float) -> Spread:
        middle *= random_.uniform(0.99, 1.01)
        return Spread(middle, 0.97 * middle, 1.04 * middle, 10)

    return tuple(
        Latency(name, 100, 100, spread(96 * f), spread(27 * f), spread(2780 * f))
        for name in get_args(Variant)
        if (f := factors.get(name))
    )


def run_record(method: str, task: str, seed: int = 0, samples: bool = True) -> RunRecord:
    variants: tuple[Variant, ...] = ("base",) if method == "base" else ("unmerged", "merged")
    answers = {v: correct(method, task, seed, flips=v == "merged") for v in variants}
    names = {v: f"samples/{method}--{task}--seed{seed}--{v}.jsonl.gz" for v in variants}
    trains = method != "base"
    return RunRecord(
        suite="quickstart",
        name=f"{method}--{task}",
        method=method,
        task=task,
        seed=seed,
        config={**CONFIG, "learning_rate": 5e-4, "adapter": {"rank": 16}, "seed": seed},
        command="furina run quickstart",
        started="2026-11-20T10:00:00+00:00",
        finished="2026-11-20T10:06:00+00:00",
        provenance=PROVENANCE,
        backbone=Backbone("smollm2-135m-instruct", "b" * 64),
        data=(Data(task, "wheel", "d" * 64, "e" * 64, "f" * 64, f"test-{TASKS[task][0]}-seed0"),),
        training=training(method, task, seed) if trains else None,
        evaluations=tuple(
            score(v, task, answers[v], names[v] if samples else None) for v in variants
        ),
        merge=Merge(210, 0.0123, 0.18, 0.031, 0.004, 1) if trains else None,
        latency=latency(method, task, seed),
    )


def write_run(folder: Path, record: RunRecord) -> Path:
    """Write a record and its per-question outputs; return the record's path."""
    path = folder / record.file_name
    record.write(path)
    for s in record.evaluations:
        if s.samples is not None:
            flips = int(s.variant == "merged")
            answers = correct(record.method, record.task, record.seed, flips)
            write_samples(folder / s.samples, s.metric, answers)
    return path


def write_row(
    folder: Path, row: str, task: str, answers: Sequence[bool], seed: int = 0, **changes: Any
) -> RunRecord:
    """Write a run that gave `answers`, merged and unmerged, and return its record.

    Rows other than base and lora are of method furina. `changes` replace fields of the record.
    """
    method = row if row in ("base", "lora") else "furina"
    variants: tuple[Variant, ...] = ("base",) if row == "base" else ("unmerged", "merged")
    name = f"{row}--{task}--seed{seed}"
    files = {v: f"samples/{name}--{task}--{v}.jsonl.gz" for v in variants}
    for file in files.values():
        write_samples(folder / file, "acc", answers)
    like = run_record(method, "arc_easy", seed, samples=False)
    record = replace(
        like,
        name=name,
        task=task,
        config={**like.config, "row": "" if row == method else row},
        data=(replace(like.data[0], task=task, test_subset=f"test-{len(answers)}"),),
        evaluations=tuple(score(v, task, answers, files[v]) for v in variants),
    )
    record = replace(record, **changes)
    record.write(folder / record.file_name)
    return record


def write_samples(path: Path, metric: str, answers: Sequence[bool], first_id: int = 0) -> None:
    numbered = enumerate(answers, first_id)
    rows = [{"id": f"q{i}", "correct": {metric: answer}} for i, answer in numbered]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0))


def write_suite(folder: Path, seeds: tuple[int, ...] = (0,)) -> list[Path]:
    """Write base, LoRA and FURINA on both tasks, base with the first seed only."""
    runs = [
        run_record(method, task, seed)
        for method in ("base", "lora", "furina")
        for task in TASKS
        for seed in (seeds[:1] if method == "base" else seeds)
    ]
    return [write_run(folder, run) for run in runs]


def search_record(
    method: str,
    task: str,
    learning_rate: float,
    value: float | None,
    multiplier: float | None = None,
    seed: int = 0,
) -> SearchRecord:
    return SearchRecord(
        method=method,
        task=task,
        protocol="text",
        learning_rate=learning_rate,
        magnitude_multiplier=multiplier,
        steps=60,
        seed=seed,
        metric="acc",
        value=value,
        stderr=None if value is None else 0.027,
        n=300,
        seconds=290.0,
        config={**CONFIG, "seed": seed},
        command="furina run search",
        provenance=PROVENANCE,
    )


def selection_record(seed: int, coefficient: float, share: float) -> SelectionRecord:
    return SelectionRecord(
        method="furina",
        task="arc_easy",
        seed=seed,
        coefficient=coefficient,
        reduction="sum",
        top_k=2,
        steps=60,
        top_k_share=share,
        final_loss=1.2 + 0.01 * seed,
        gradient_ratio=0.2 if coefficient else None,
        config={**CONFIG, "seed": seed},
        command="furina run selection",
        provenance=PROVENANCE,
    )
