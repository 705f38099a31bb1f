"""Time greedy generation of every method, merged and unmerged, and of peers; JSON comes last.

    make moe-peft
    python benchmarks/latency.py --results results/latency
    python benchmarks/latency.py --backbone tiny-llama --only base furina_unmerged --rounds 2
    python benchmarks/latency.py --only disk_base disk_merged --rounds 100 --new-tokens 20

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

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import latency_report
import torch
from command_line import command_line, device
from latency_variants import COMPILED, build, variant_names
from torch import Tensor
from training_peers import ENVIRONMENT

import furina
from furina.errors import FurinaError
from furina.evaluation.latency import Timer, interleaved, random_prompts
from furina.records.environment import provenance


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", help="of transformers; moe_peft's is eager")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default_device)
    parser.add_argument("--only", nargs="+", help="variants; default: all that are not compiled")
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[100])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1])
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="untimed rounds before")
    parser.add_argument("--rank", type=int, default=128, help="of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moe-peft", type=Path, default=ENVIRONMENT, help="its environment")
    parser.add_argument("--results", type=Path, help="folder for latency.json, .md and .svg")
    options = parser.parse_args(arguments)
    counts = [*options.prompt_tokens, *options.batch_sizes, options.new_tokens - 1]
    if min(*counts, options.rounds, options.experts) < 1 or options.warmup < 0:
        parser.error("every count must be at least 1, --new-tokens 2 and --warmup 0")
    if options.rank % options.experts:
        parser.error("--experts must divide --rank")
    options.dropout = 0.0
    return options


def select(only: Sequence[str] | None) -> list[str]:
    """Return the chosen variants; exits with the choice where a word names none."""
    names = variant_names()
    if only is None:
        return [name for name in names if name not in COMPILED]
    if unknown := sorted(set(only) - set(names)):
        sys.exit(f"error: no variant is called {', '.join(unknown)}; choose of {', '.join(names)}")
    return [name for name in names if name in only]


def build_all(
    names: Sequence[str], backbone: Any, options: argparse.Namespace
) -> tuple[dict[str, Timer], dict[str, str]]:
    """Return the timers that can be built, and why others cannot."""
    timers: dict[str, Timer] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            timers[name] = build(name, backbone, options)
            timers[name](next(random_prompts(backbone, (1, 2))), 2)
        except Exception as error:
            timers.pop(name, None)
            plain = isinstance(error, FurinaError)
            failed[name] = str(error) if plain else f"{type(error).__name__}: {error}"
            print(f"{name}: failed: {failed[name]}", flush=True)
    return timers, failed


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Time every combination of prompt length and batch size; return the report."""
    names = select(options.only)
    torch.set_num_threads(options.threads)
    backbone = furina.load_backbone(
        options.backbone, options.dtype, options.device, options.attention
    ).requires_grad_(False)
    timers, failed = build_all(names, backbone, options)
    environment = asdict(provenance())
    environment["packages"] |= {"peft": version("peft")}
    for timer in timers.values():
        environment["packages"] |= getattr(timer, "versions", {})
    cells = []
    try:
        for batch, prompt in itertools.product(options.batch_sizes, options.prompt_tokens):
            print(f"batch {batch}, {prompt} + {options.new_tokens} tokens", flush=True)
            cells.append(time_cell(timers, backbone, (batch, prompt), options))
    finally:
        for timer in timers.values():
            getattr(timer, "close", lambda: None)()
        timers.clear()
        gc.collect()  # models and their hooks hold each other
    hidden = ("moe_peft", "results")
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in hidden},
        "environment": environment,
        "command": command_line("latency.py", arguments),
        "cells": cells,
        "ratios": cells[0]["ratios"],
        "failed": failed,
    }


def time_cell(
    timers: Mapping[str, Timer], backbone: Any, shape: tuple[int, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Time all variants on prompts of one shape (batch, P)."""
    timings = interleaved(
        timers,
        announced(random_prompts(backbone, shape, options.seed), options),
        options.new_tokens,
        rounds=options.rounds,
        warmup=options.warmup,
        seed=options.seed,
    )
    rounds = {name: [timing._asdict() for timing in own] for name, own in timings.items()}
    return latency_report.cell(shape, options.new_tokens, rounds)


def announced(prompts: Iterator[Tensor], options: argparse.Namespace) -> Iterator[Tensor]:
    """Yield the prompts, and say which round each begins."""
    for number, prompt in enumerate(prompts, start=1):
        print(f"round {number} of {options.warmup} to warm up and {options.rounds}", flush=True)
        yield prompt


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        report = measure(options, arguments)
        print(latency_report.markdown(report))
        if options.results:
            latency_report.write(report, options.results)
    except FurinaError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
