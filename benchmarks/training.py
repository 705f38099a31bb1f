"""Time one optimiser step of every method, and of peft's and moe_peft's; the last line is JSON.

    make moe-peft
    python benchmarks/training.py --memory furina same_loop/peft_lora --results results/training
    python benchmarks/training.py --backbone tiny-llama --only lora furina peft_lora --rounds 1

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

import argparse
import contextlib
import gc
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import training_report
from command_line import command_line, device
from training_peers import CHECKPOINTS, ENVIRONMENT, MOE_PEFT, TOP_K, Peer
from training_report import Rounds, experts_case
from training_variants import NO_LOSS, PEFT, Batch, Variant, build, random_batch

import furina
from furina.errors import FurinaError
from furina.records.environment import provenance

COMMON = ("floor", "lora", "furina")
"""What every group times, to be held against."""
FIRST = (*COMMON, NO_LOSS, "dora")
MEMORY_STEPS = 3
Variants = dict[str, Variant | Peer]
Failed = dict[str, str]
"""Why a variant has no time, and under memory/NAME why it has no memory."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="eager", help="of transformers; moe_peft's is eager")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default_device)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of a row")
    parser.add_argument("--rank", type=int, default=128, help="of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7, help="0 to time nothing")
    parser.add_argument("--only", nargs="+", help="variants, with or without their loop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", nargs="+", default=[], help="variants whose peak is measured")
    parser.add_argument("--memory-experts", nargs="+", type=int, default=[], help="FURINA's, too")
    parser.add_argument("--memory-repeats", type=int, default=3, help="fresh processes each")
    parser.add_argument("--moe-peft", type=Path, default=ENVIRONMENT, help="its environment")
    parser.add_argument("--results", type=Path, help="folder for step.json, step.md and step.svg")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min([options.experts, *options.memory_experts]) < 1:
        parser.error("--memory-experts must, like --experts, be at least 1")
    if any(options.rank % experts for experts in options.memory_experts):
        parser.error("--memory-experts must divide --rank")
    if options.rank % options.experts:
        parser.error("--experts must divide --rank")
    if options.rounds < 0 or options.memory_repeats < 1:
        parser.error("--rounds must be 0 or larger and --memory-repeats at least 1")
    return options


def variant_names() -> list[str]:
    others = [name for name in furina.methods() if name not in FIRST]
    peers = [f"{loop}/{name}" for loop in ("same_loop", "as_shipped") for name in PEFT]
    moe_peft = [f"{loop}/{name}" for name in MOE_PEFT for loop in CHECKPOINTS]
    return [*FIRST, *others, *peers, *moe_peft]


def select(only: Sequence[str] | None) -> list[str]:
    """Return the chosen variants; exits with the choice where a word names none."""
    names = variant_names()
    if only is None:
        return names
    chosen = [name for name in names if {name, name.rpartition("/")[2]} & set(only)]
    known = {word for name in names for word in (name, name.rpartition("/")[2])}
    if unknown := sorted(set(only) - known):
        sys.exit(f"error: no variant is called {', '.join(unknown)}; choose of {', '.join(names)}")
    return chosen


def grouped(names: Sequence[str]) -> list[list[str]]:
    """Cut the variants into groups: ours, peft's with their namesakes, moe_peft's by method."""
    ours = [name for name in names if "/" not in name]
    peft = [name for name in names if name.rpartition("/")[2] in PEFT]
    groups = [ours, [*_beside(ours, "dora"), *peft] if peft else []]
    for peer in MOE_PEFT:
        if loops := [name for name in names if name.rpartition("/")[2] == peer]:
            groups.append([*_beside(ours, peer.rpartition("_")[2]), *loops])
    return [group for group in groups if group]


def _beside(ours: Sequence[str], method: str) -> list[str]:
    return [name for name in ours if name in (*COMMON, method)]


def prepare(options: argparse.Namespace) -> tuple[torch.nn.Module, Batch]:
    """Return the frozen backbone and the batch."""
    torch.set_num_threads(options.threads)
    model = furina.load_backbone(
        options.backbone, options.dtype, options.device, options.attention
    ).requires_grad_(False)
    return model, random_batch(model.config.vocab_size, options)


def make(
    name: str, model: torch.nn.Module, batch: Batch, options: argparse.Namespace
) -> Variant | Peer:
    peer = name.rpartition("/")[2]
    if peer in MOE_PEFT:
        return Peer(name, batch, options)
    return build(name, model, batch, options)


@contextlib.contextmanager
def running(names: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[Variants, Failed]]:
    """Yield the variants that can be built, on one copy of the weights, and why others cannot."""
    variants: Variants = {}
    failed: Failed = {}
    model, batch = prepare(options)
    try:
        for name in names:
            try:
                variants[name] = make(name, model, batch, options)
            except Exception as error:
                fail(failed, name, error)
        yield variants, failed
    finally:
        for variant in variants.values():
            variant.close()


def fail(failed: Failed, name: str, reason: Exception | str) -> None:
    """Note and print why a variant has no result; the others go on."""
    plain = isinstance(reason, FurinaError | str)
    failed[name] = str(reason) if plain else f"{type(reason).__name__}: {reason}"
    print(f"{name}: failed: {failed[name]}", flush=True)


def time_rounds(
    variants: Variants, failed: Failed, rounds: int, seed: int
) -> tuple[Rounds, dict[str, float]]:
    """Step each variant once to warm up, then once in every round; return seconds and first losses.

    One that fails is left out of all rounds.
    """
    seconds: Rounds = {name: [] for name in variants}
    losses: dict[str, float] = {}
    order = random.Random(seed)
    for number in range(rounds + 1):
        for name in order.sample(list(seconds), k=len(seconds)):
            try:
                took = variants[name].seconds()
                if number:
                    seconds[name].append(took)
                else:
                    losses[name] = variants[name].loss
            except Exception as error:
                fail(failed, name, error)
                del seconds[name]
        print(f"round {number} of {rounds}" if number else "warm", flush=True)
    return seconds, {name: losses[name] for name in seconds}


class Timed(NamedTuple):
    """What the rounds of a group showed, by variant."""

    rounds: Rounds
    first_loss: dict[str, float]
    trainable: dict[str, int]
    versions: dict[str, str]


def time_group(
    names: Sequence[str], failed: Failed, options: argparse.Namespace, seed: int
) -> Timed:
    """Build the variants of a group and time their rounds; nothing of them stays."""
    with running(names, options) as (variants, new):
        failed |= new
        trainable = {name: variant.trainable for name, variant in variants.items()}
        versions = {
            package: version
            for variant in variants.values()
            for package, version in variant.versions.items()
        }
        rounds, losses = time_rounds(variants, failed, options.rounds, seed)
    return Timed(rounds, losses, trainable, versions)


def memory_cases(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return by name what is measured, and the arguments that make it."""
    cases = {name: ["--one", name] for name in (select(options.memory) if options.memory else [])}
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
        command = [sys.executable, __file__, *arguments, *case]
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


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the memory of one variant, in this fresh process."""
    with running([name], options) as (variants, failed):
        if failed:
            return {"error": failed[name]}
        return {"bytes": variants[name].memory(MEMORY_STEPS)}


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure what the options ask for; return the report."""
    failed = Failed()
    groups = grouped(select(options.only)) if options.rounds else []
    memory = memory_of(memory_cases(options), failed, options.memory_repeats, arguments)
    timed = []
    for number, names in enumerate(groups, start=1):
        print(f"group {number} of {len(groups)}: {', '.join(names)}", flush=True)
        timed.append(time_group(names, failed, options, options.seed + number))
        gc.collect()  # models and their hooks hold each other
    rounds = [group.rounds for group in timed]
    hidden = ("moe_peft", "results", "one")
    environment = asdict(provenance())
    for group in timed:
        environment["packages"] |= group.versions
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in hidden},
        "environment": environment,
        "command": command_line("training.py", arguments),
        "seconds": {name: spread(values) for name, values in pooled(rounds).items()},
        "rounds": rounds,
        "memory_bytes": memory,
        "trainable": {name: size for group in timed for name, size in group.trainable.items()},
        "first_loss": {name: loss for group in timed for name, loss in group.first_loss.items()},
        "ratios": training_report.ratios(rounds, memory)
        | training_report.expert_ratios(memory, options.experts),
        "ratios_to": {
            other: training_report.ratios_to(rounds, other) for other in ("lora", "floor")
        },
        "failed": failed,
    }


def pooled(groups: Sequence[Rounds]) -> Rounds:
    """Return every variant's seconds in all rounds of all groups."""
    found: Rounds = {}
    for rounds in groups:
        for name, values in rounds.items():
            found.setdefault(name, []).extend(values)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles; a single value is all three."""
    more = [*values, *values][: max(len(values), 2)]
    q1, median, q3 = statistics.quantiles(more, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    if options.one:
        print(json.dumps(one(options.one, options)))
        return
    try:
        report = measure(options, arguments)
    except FurinaError as error:
        sys.exit(f"error: {error}")
    print(training_report.text(report), end="")
    if options.results:
        training_report.write(report, options.results)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
