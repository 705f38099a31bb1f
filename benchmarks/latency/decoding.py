"""Time greedy generation of every method, merged and unmerged, and of peers; JSON comes last.

    make moe-peft
    python -m benchmarks.latency.decoding --results results/latency
    python -m benchmarks.latency.decoding --backbone tiny-llama --only base furina_merged
    python -m benchmarks.latency.decoding --only disk_base disk_merged --rounds 100 --new-tokens 20

Every round times each variant once, on the same random prompt, in a new random order, and a ratio
is the median over rounds of two times of one round. `base` is the backbone: 1.00. An unmerged
method is what a trained adapter runs as: FURINA and LoRA as one low-rank pair beside W; `_literal`
is the same update with each expert by itself. `disk_base` and `disk_merged` are whole folders
loaded alike, and their ratio is `merged/base`. moe_peft runs in an environment of its own, with its
own engine: compare its mixtures with its LoRA. `compiled_` variants decode through torch.compile
with a static cache, compiled in the warm-up; unmerged ones as the LoRA that has the same factors.

Prompt lengths and batch sizes are crossed; the first combination gives the top level's `ratios`.
Adapters are new ones with every parameter moved a little: time does not depend on how.
"""

from __future__ import annotations

import gc
import itertools
import random
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common.command import Parser, Report, described, run, select
from benchmarks.common.models import backbone_of
from benchmarks.common.moe_peft import ENVIRONMENT
from benchmarks.common.rounds import Failed, interleaved, make_each
from benchmarks.latency import page
from benchmarks.latency.variants import COMPILED, build, variant_names
from furina.evaluation.latency import Timer, random_prompts


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    shared = "backbone dtype device rank experts rounds threads seed results"
    made = Parser(__doc__, shared, dropout=0.0)
    made.add_argument("--attention", help="of transformers; moe_peft's is eager")
    made.add_argument("--only", nargs="+", help="variants; default: all that are not compiled")
    made.add_argument("--prompt-tokens", nargs="+", type=int, default=[100])
    made.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    made.add_argument("--new-tokens", type=int, default=100)
    made.add_argument("--warmup", type=int, default=1, help="untimed rounds before")
    made.add_argument("--moe-peft", type=Path, default=ENVIRONMENT, help="its environment")
    counts = "prompt_tokens batch_sizes rounds experts threads"
    return made.checked(arguments, counts, new_tokens=2, warmup=0)


def chosen(only: Sequence[str] | None) -> list[str]:
    """Return the chosen variants, by default all that are not compiled."""
    names = variant_names()
    return select(names, only or [name for name in names if name not in COMPILED])


def warm(name: str, backbone: Any, options: Namespace) -> Timer:
    """Build a timer and let it generate two tokens."""
    timer = build(name, backbone, options)
    timer(next(random_prompts(backbone, (1, 2))), 2)
    return timer


def measure(options: Namespace, command: str) -> Report:
    """Time every combination of prompt length and batch size; return the report."""
    names = chosen(options.only)
    backbone = backbone_of(options, options.attention)
    failed: Failed = {}
    timers = make_each(names, lambda name: warm(name, backbone, options), failed)
    packages = {"peft": version("peft")}
    cells = []
    try:
        for timer in timers.values():
            packages |= getattr(timer, "versions", {})
        for batch, prompt in itertools.product(options.batch_sizes, options.prompt_tokens):
            print(f"batch {batch}, {prompt} + {options.new_tokens} tokens", flush=True)
            cells.append(time_cell(timers, backbone, (batch, prompt), options))
    finally:
        for timer in timers.values():
            getattr(timer, "close", lambda: None)()
        timers.clear()
        gc.collect()  # models and their hooks hold each other
    return {
        **described(options, command, **packages),
        "cells": cells,
        "ratios": cells[0]["ratios"],
        "failed": failed,
    }


def time_cell(
    timers: Mapping[str, Timer], backbone: Any, shape: tuple[int, int], options: Namespace
) -> Report:
    """Time all variants on prompts of one shape (batch, P), the same in each round."""
    count = options.warmup + options.rounds
    prompts = [*itertools.islice(random_prompts(backbone, shape, options.seed), count)]

    def once(timer: Timer, number: int) -> dict[str, float]:
        return timer(prompts[number], options.new_tokens)._asdict()

    timed = interleaved(
        {name: partial(once, timer) for name, timer in timers.items()},
        count,
        random.Random(options.seed),
    )
    rounds = {name: own[options.warmup :] for name, own in timed.items()}
    return page.cell(shape, options.new_tokens, rounds)


main = partial(run, "latency.decoding", parse, measure, "latency", page.page)

if __name__ == "__main__":
    main()
