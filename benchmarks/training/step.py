"""Time one optimiser step of every method, and of peft's and moe_peft's; the last line is JSON.

    make moe-peft
    python -m benchmarks.training.step --memory furina --results results/training
    python -m benchmarks.training.step --backbone tiny-llama --only lora furina peft_lora --rounds 1

A step is forward, backward, clipping and optimiser on one fixed batch of random tokens of which
only the last eight of a row are the answer; all methods have the same total rank. Variants are
stepped in rounds of random order, and a ratio is the median over rounds of two times of one round.

`same_loop/` puts peft's adapter into our loop (logits of the answer only, fused AdamW);
`as_shipped/` is a peer's usual loop: logits of every token and a plain AdamW. moe_peft runs in an
environment of its own; its trainer clips no gradient, and recomputes activations in the backward,
which costs time and saves memory: `kept/` is the same loop without that. Its plain LoRA, on
attention in a mixture too, cannot do without drawing dropout.

Variants are stepped in groups, one after the other, so that memory need not hold all of them. Each
group has the floor, our LoRA and FURINA in its rounds, and a peer has its namesake beside it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import statistics
import subprocess
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import furina
from benchmarks.common.command import Parser, Report, described, run, select
from benchmarks.common.models import backbone_of
from benchmarks.common.moe_peft import CHECKPOINTS, ENVIRONMENT, PEERS, TOP_K, Peer
from benchmarks.common.rounds import Failed, fail, interleaved, make_each, spread
from benchmarks.training import step_page
from benchmarks.training.step_page import Rounds, experts_case
from benchmarks.training.variants import NO_LOSS, PEFT, Variant, build, random_batch
from furina.data.batches import Batch

SCRIPT = "training.step"
COMMON = ("floor", "lora", "furina")
"""What every group times, to be held against."""
FIRST = (*COMMON, NO_LOSS, "dora")
MEMORY_STEPS = 3
Variants = dict[str, Variant | Peer]


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    shared = "backbone dtype device rank experts rounds threads seed results"
    made = Parser(__doc__, shared, rounds=7)
    made.add_argument("--attention", default="eager", help="of transformers; moe_peft's is eager")
    made.add_argument("--rows", type=int, default=16)
    made.add_argument("--tokens", type=int, default=64, help="of a row")
    made.add_argument("--dropout", type=float, default=0.0)
    made.add_argument("--only", nargs="+", help="variants, with or without their loop")
    made.add_argument("--memory", nargs="+", default=[], help="variants whose peak is measured")
    made.add_argument("--memory-experts", nargs="+", type=int, default=[], help="FURINA's, too")
    made.add_argument("--memory-repeats", type=int, default=3, help="fresh processes each")
    made.add_argument("--moe-peft", type=Path, default=ENVIRONMENT, help="its environment")
    made.add_argument("--one", help=SUPPRESS)
    options = made.checked(
        arguments, "rows experts memory_experts memory_repeats threads", rounds=0
    )
    if any(options.rank % experts for experts in options.memory_experts):
        made.error("--memory-experts must divide --rank")
    return options


def variant_names() -> list[str]:
    """Return every variant, ours first."""
    others = [name for name in furina.methods() if name not in FIRST]
    peers = [f"{loop}/{name}" for loop in ("same_loop", "as_shipped") for name in PEFT]
    moe_peft = [f"{loop}/{name}" for name in PEERS for loop in CHECKPOINTS]
    return [*FIRST, *others, *peers, *moe_peft]


def chosen(only: Sequence[str] | None) -> list[str]:
    """Return the chosen variants, all by default."""
    names = variant_names()
    return names if only is None else select(names, only)


def grouped(names: Sequence[str]) -> list[list[str]]:
    """Cut the variants into groups: ours, peft's with their namesakes, moe_peft's by method."""
    ours = [name for name in names if "/" not in name]
    peft = [name for name in names if name.rpartition("/")[2] in PEFT]
    groups = [ours, [*_beside(ours, "dora"), *peft] if peft else []]
    for peer in PEERS:
        if loops := [name for name in names if name.rpartition("/")[2] == peer]:
            groups.append([*_beside(ours, peer.rpartition("_")[2]), *loops])
    return [group for group in groups if group]


def _beside(ours: Sequence[str], method: str) -> list[str]:
    return [name for name in ours if name in (*COMMON, method)]


def prepare(options: Namespace) -> tuple[Any, Batch]:
    """Return the frozen backbone and the batch."""
    model = backbone_of(options, options.attention)
    batch = random_batch(model.config.vocab_size, options.rows, options.tokens, options.seed)
    return model, batch


def make(name: str, model: torch.nn.Module, batch: Batch, options: Namespace) -> Variant | Peer:
    """Return one variant, in this process or in moe_peft's."""
    theirs = name.rpartition("/")[2] in PEERS
    return Peer(name, batch, options) if theirs else build(name, model, batch, options)


@contextlib.contextmanager
def running(names: Sequence[str], failed: Failed, options: Namespace) -> Iterator[Variants]:
    """Yield the variants that can be built, on one copy of the weights; note why others cannot."""
    model, batch = prepare(options)
    variants = make_each(names, lambda name: make(name, model, batch, options), failed)
    try:
        yield variants
    finally:
        for variant in variants.values():
            variant.close()


def time_rounds(
    variants: Variants, failed: Failed, rounds: int, seed: int
) -> tuple[Rounds, dict[str, float]]:
    """Step each variant once to warm up, then once in every round; return seconds and first losses.

    One that fails is left out of all rounds.
    """
    runs = {name: lambda _, own=own: own.step() for name, own in variants.items()}
    steps = interleaved(runs, rounds + 1, random.Random(seed), failed)
    seconds = {name: [took for took, _ in own[1:]] for name, own in steps.items()}
    return seconds, {name: own[0][1] for name, own in steps.items()}


def memory_cases(options: Namespace) -> dict[str, list[str]]:
    """Return by name what is measured, and the arguments that make it."""
    cases = {name: ["--one", name] for name in chosen(options.memory)}
    for experts in options.memory_experts:
        few = experts - 1 <= TOP_K  # routed experts to choose from, beside the shared one
        for name in (NO_LOSS,) if few else ("furina", NO_LOSS):
            cases[experts_case(name, experts)] = ["--one", name, "--experts", str(experts)]
    return cases


def memory_of(
    cases: dict[str, list[str]], failed: Failed, repeats: int, arguments: Sequence[str]
) -> dict[str, int]:
    """Return the peak memory of each case, the median over fresh processes."""
    found: dict[str, int] = {}
    for name, case in cases.items():
        command = [sys.executable, "-m", f"benchmarks.{SCRIPT}", *arguments, *case]
        answers = []
        for _ in range(repeats):
            done = subprocess.run(command, capture_output=True, text=True)
            lines = done.stdout.splitlines() or ["{}"]
            told = json.loads(lines[-1]) if done.returncode == 0 else {}
            if "bytes" not in told:
                last = (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]
                fail(failed, f"memory/{name}", told.get("error", last))
                break
            answers.append(told["bytes"])
        else:
            found[name] = int(statistics.median(answers))
            print(f"{name:<28} {found[name] / 2**20:8.0f} MiB", flush=True)
    return found


def one(name: str, options: Namespace) -> Report:
    """Return the memory of one variant, in this fresh process."""
    failed: Failed = {}
    with running([name], failed, options) as variants:
        return {"error": failed[name]} if failed else {"bytes": variants[name].memory(MEMORY_STEPS)}


def measure(arguments: Sequence[str], options: Namespace, command: str) -> Report:
    """Measure what the options ask for; return the report."""
    failed: Failed = {}
    groups = grouped(chosen(options.only)) if options.rounds else []
    memory = memory_of(memory_cases(options), failed, options.memory_repeats, arguments)
    rounds: list[Rounds] = []
    first_loss: dict[str, float] = {}
    trainable: dict[str, int] = {}
    versions: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        print(f"group {number} of {len(groups)}: {', '.join(names)}", flush=True)
        with running(names, failed, options) as variants:
            trainable |= {name: own.trainable for name, own in variants.items()}
            versions |= {k: v for own in variants.values() for k, v in own.versions.items()}
            seconds, losses = time_rounds(variants, failed, options.rounds, options.seed + number)
        rounds.append(seconds)
        first_loss |= losses
        del variants
        gc.collect()  # models and their hooks hold each other
    every = dict.fromkeys(name for group in rounds for name in group)
    pooled = {name: [s for group in rounds for s in group.get(name, ())] for name in every}
    return {
        **described(options, command, **versions),
        "seconds": {name: spread(values) for name, values in pooled.items()},
        "rounds": rounds,
        "memory_bytes": memory,
        "trainable": trainable,
        "first_loss": first_loss,
        "ratios": step_page.ratios(rounds, memory)
        | step_page.expert_ratios(memory, options.experts),
        "ratios_to": {other: step_page.ratios_to(rounds, other) for other in ("lora", "floor")},
        "failed": failed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; with --one, print one variant's memory alone."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if options.one:
        print(json.dumps(one(options.one, options)))
        return
    run(SCRIPT, parse, partial(measure, arguments), "step", step_page.page, arguments)


if __name__ == "__main__":
    main()
