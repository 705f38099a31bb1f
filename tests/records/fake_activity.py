"""Invented activities of experts, made from a seed: they drive the tests and measure nothing."""

from __future__ import annotations

import random
from collections.abc import Sequence

from furina.records import (
    ActivityRecord,
    Backbone,
    ExpertWeights,
    TaskActivity,
    TokenExample,
)
from tests.records.fakes import PROVENANCE

KINDS = ("self_attn.q_proj", "mlp.down_proj")
LAYERS = 3
EXPERTS = 4
LINEARS = tuple(f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS)

MISSING = {"shared_part": "no shared experts", "effective_rank": "there is a router"}


def loads(luck: random.Random, experts: int = EXPERTS) -> tuple[float, ...]:
    drawn = [luck.uniform(0.2, 1.0) for _ in range(experts)]
    return tuple(value / sum(drawn) for value in drawn)


def task_activity(task: str, seed: int = 0, shared: bool = True) -> TaskActivity:
    luck = random.Random(f"{task} {seed}")

    def each(low: float, high: float) -> tuple[float, ...]:
        return tuple(luck.uniform(low, high) for _ in LINEARS)

    return TaskActivity(
        task=task,
        protocol="text",
        protocol_version="1",
        subset="subset-64-seed0",
        sha256=task[0] * 64,
        items=64,
        tokens=3100,
        top_k_share=each(0.5, 0.9),
        entropy=each(0.6, 1.0),
        frequency=tuple(loads(luck) for _ in LINEARS),
        share=tuple(loads(luck) for _ in LINEARS),
        first=tuple(loads(luck) for _ in LINEARS),
        shared_norm=each(1.0, 2.0) if shared else None,
        routed_norm=each(0.5, 1.0) if shared else None,
    )


def example(task: str, count: int = 6, seed: int = 0) -> TokenExample:
    luck = random.Random(f"{task} {seed} tokens")
    texts = (" the", "ing", "\n", "$x$", "[", "語", " ")
    return TokenExample(
        task=task,
        tokens=tuple(luck.choice(texts) for _ in range(count)),
        answer_length=2,
        expert=tuple(tuple(luck.randrange(EXPERTS) for _ in range(count)) for _ in range(LAYERS)),
        share=tuple(tuple(luck.random() for _ in range(count)) for _ in range(LAYERS)),
    )


def activity_record(
    row: str = "furina",
    tasks: Sequence[str] = ("arc_easy", "openbookqa"),
    task: str = "arc_easy",
    seed: int | None = 0,
    shared: bool = True,
) -> ActivityRecord:
    return ActivityRecord(
        suite="activity",
        row=row,
        method="furina" if shared else "mola",
        task=task,
        seed=seed,
        adapter={"rank": 16, "top_k": 2},
        backbone=Backbone("smollm2-135m-instruct", "b" * 64),
        top_k=2,
        linears=LINEARS,
        experts=(EXPERTS,) * len(LINEARS),
        tasks=tuple(task_activity(name, seed or 0, shared) for name in tasks),
        weights=ExpertWeights(
            LINEARS,
            tuple(0.01 * (i + 1) for i in range(len(LINEARS))),
            tuple(20.0 + i for i in range(len(LINEARS))) if shared else None,
        ),
        shown=tuple(name for name in LINEARS if name.endswith("down_proj")),
        examples=tuple(example(name, seed=seed or 0) for name in tasks),
        missing={} if shared else dict(MISSING),
        command="furina run activity",
        provenance=PROVENANCE,
        dtype="bfloat16",
    )
