"""Serve the base, the merged model and the LoRA with vLLM: times and correctness; JSON comes last.

    make vllm
    python benchmarks/vllm_engine.py --results results/vllm
    python benchmarks/vllm_engine.py --adapter-path runs/demo/adapter --rounds 5
    python benchmarks/vllm_engine.py --dtype float32 --rounds 0

`base` is the backbone's folder, `merged` the one of furina.export_merged, `adapter` the backbone
with the LoRA of furina.export_peft beside it, and `base_again` the base once more, whose ratio
differs from 1 by noise alone. Each is one engine in a process of its own; a round asks each for one
generation at batch 1 after the same random prompt, in a new random order, and a ratio is the median
over rounds of two times of one round, with a bootstrap interval.

What is computed is held against our own model in two ways. Prompts of real text are scored, and
vLLM's likeliest token at every position must be ours wherever our lead is larger than what rounding
does (vllm_checks.verdict). And generations are compared token by token with those of transformers;
there nothing must be equal, since a rounded tie changes all that follows.

Without --adapter-path the adapter is a new FURINA whose every parameter has moved.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import vllm_report
from command_line import command_line, device
from vllm_checks import Reference, agreement, changed, told, verdict
from vllm_models import EXACT, RANDOM, Exports, continuations, export, prompts, reference
from vllm_process import ENVIRONMENT, Engine, interpreter, room_for

import furina
from furina.errors import FurinaError
from furina.evaluation.latency import Timing
from furina.records.environment import provenance

VARIANTS = ("base", "merged", "adapter", "base_again")
CHECKED = VARIANTS[:3]
MEMORY_SHARE = 0.2
"""Of an accelerator, for each engine."""

Engines = dict[str, Engine]
Failed = dict[str, str]
"""Why a variant has no result."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--adapter-path", type=Path, help="a saved furina adapter")
    parser.add_argument("--dtype", choices=tuple(EXACT), default="bfloat16")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default_device, help="of our own models")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rank", type=int, default=128, help="of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--relative-update", type=float, default=0.03, help="|ΔW|/|W|")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20, help="0 to time nothing")
    parser.add_argument("--warmup", type=int, default=2, help="untimed rounds before")
    parser.add_argument("--rows", type=int, default=32, help="of text that are scored")
    parser.add_argument("--row-tokens", type=int, default=64, help="of a scored row")
    parser.add_argument("--generations", type=int, default=8, help="compared with transformers'")
    parser.add_argument("--task", default="arc_easy", help=f"whose text is read, or {RANDOM}")
    threads = max(1, (os.cpu_count() or 1) - 1)  # as vLLM itself chooses: one is for the rest
    parser.add_argument("--threads", type=int, default=threads, help="of each engine's model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm", type=Path, default=ENVIRONMENT, help="its environment")
    parser.add_argument("--results", type=Path, help="folder for engine.json and engine.md")
    options = parser.parse_args(arguments)
    counts = (options.prompt_tokens, options.new_tokens - 1, options.rows, options.row_tokens - 1)
    if min(*counts, options.generations, options.experts, options.threads) < 1:
        parser.error("every count must be at least 1, --new-tokens and --row-tokens 2")
    if options.rounds < 0 or options.warmup < 0 or options.relative_update <= 0:
        parser.error("--rounds and --warmup must be 0 or larger, --relative-update positive")
    if options.rank % options.experts:
        parser.error("--experts must divide --rank")
    return options


def start(exports: Exports, failed: Failed, options: argparse.Namespace) -> Engines:
    """Load every variant in a fresh process; one that fails is noted and left out."""
    engines: Engines = {}
    for name in (each for each in VARIANTS if each in options.only):
        try:
            engines[name] = Engine(options.vllm, options.threads, **setup(name, exports, options))
        except FurinaError as error:
            fail(failed, name, error)
        else:
            print(f"{name}: loaded in {engines[name].load_seconds:.1f} s", flush=True)
    return engines


def setup(name: str, exports: Exports, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a worker is told to load."""
    longest = max(options.prompt_tokens + options.new_tokens, options.row_tokens + 1)
    return {
        "model": str(exports.merged if name == "merged" else exports.base),
        "adapter": str(exports.lora),
        "rank": room_for(exports.rank) if name == "adapter" else 0,
        "dtype": options.dtype,
        "max_tokens": longest,
        "memory_share": MEMORY_SHARE,
    }


def fail(failed: Failed, name: str, reason: FurinaError) -> None:
    """Note and print why a variant has no result; the others go on."""
    failed[name] = str(reason)
    print(f"{name}: failed: {failed[name]}", flush=True)


def end(engines: Engines, name: str) -> None:
    """Take an engine out and end it."""
    engines.pop(name).close()


def time_rounds(
    engines: Engines, failed: Failed, vocabulary: int, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Time each engine once a round, all on the same new prompt; return the warm rounds' times.

    One that fails is left out of all rounds.
    """
    generator = torch.Generator().manual_seed(options.seed)
    order = random.Random(options.seed)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for number in range(options.warmup + options.rounds if options.rounds else 0):
        prompt = torch.randint(vocabulary, (options.prompt_tokens,), generator=generator).tolist()
        for name in order.sample(list(engines), len(engines)):
            try:
                timing = Timing.of_steps(engines[name].times(prompt, options.new_tokens))
            except FurinaError as error:
                fail(failed, name, error)
                end(engines, name)
                continue
            if number >= options.warmup:
                rounds[name].append(timing._asdict())
        print(f"round {number + 1} of {options.warmup + options.rounds}", flush=True)
    return {name: rounds[name] for name in engines}


Answers = dict[str, dict[str, Any]]
"""By variant: the scores of the rows and the tokens generated after the prompts."""


def ask(
    engines: Engines, failed: Failed, rows: list[list[int]], asked: list[list[int]], new_tokens: int
) -> Answers:
    """Return what each engine says of the rows and after the prompts."""
    answers: Answers = {}
    for name in [each for each in engines if each in CHECKED]:
        try:
            answers[name] = {
                "scores": engines[name].score(rows),
                "generated": engines[name].generate(asked, new_tokens),
            }
        except FurinaError as error:
            fail(failed, name, error)
            end(engines, name)
        else:
            print(f"{name}: scored and generated", flush=True)
    return answers


def check(
    answers: Answers, exports: Exports, rows: list[list[int]], options: argparse.Namespace
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hold the scores against ours; return the verdicts and what the update changes of them."""
    ours: dict[str, Reference] = {}
    verdicts = {}
    for name, answer in answers.items():
        ours[name] = reference(name, exports, rows, options)
        verdicts[name] = verdict(ours[name], *told(answer["scores"]), options.row_tokens - 1)
        print(f"{name}: {verdicts[name]['exceptions']} exceptions", flush=True)
    both = "base" in ours and "merged" in ours
    return verdicts, changed(ours["base"], ours["merged"]) if both else {}


def compare(
    answers: Answers, exports: Exports, asked: list[list[int]], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return how far generations agree, each pair under its name; `ours/` is transformers."""
    generated = {name: answer["generated"] for name, answer in answers.items()}
    for name in answers:
        generated[f"ours/{name}"] = continuations(name, exports, asked, options)
    pairs = (
        *(("base", "ours/base"), ("merged", "ours/merged"), ("adapter", "ours/merged")),
        *(("adapter", "merged"), ("ours/adapter", "ours/merged"), ("merged", "base")),
    )
    return {
        f"{one} and {other}": agreement(generated[one], generated[other])
        for one, other in pairs
        if one in generated and other in generated
    }


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Export, ask and compare; return the report.

    Raises FurinaError if the environment is missing, or backbone or adapter cannot be exported.
    """
    interpreter(options.vllm)
    failed: Failed = {}
    environment = asdict(provenance())
    rows, source = prompts(options.rows, options.row_tokens, options)
    asked, _ = prompts(options.generations, options.prompt_tokens, options)
    vocabulary = len(furina.load_tokenizer(options.backbone))
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        exports = export(Path(folder), options)
        engines = start(exports, failed, options)
        try:
            loads = {name: engine.load_seconds for name, engine in engines.items()}
            for engine in engines.values():
                environment["packages"] |= engine.versions
            rounds = time_rounds(engines, failed, vocabulary, options)
            answers = ask(engines, failed, rows, asked, options.new_tokens)
        finally:
            for name in list(engines):
                end(engines, name)
        verdicts, moved = check(answers, exports, rows, options)
        agreements = compare(answers, exports, asked, options)
    hidden = ("vllm", "results", "adapter_path")
    settings = {key: value for key, value in vars(options).items() if key not in hidden}
    return {
        "settings": settings
        | {"prompts": source, "adapter": options.adapter_path and options.adapter_path.name},
        "environment": environment,
        "command": command_line("vllm_engine.py", arguments),
        "update": {"relative": exports.relative_update, "rank": exports.rank, "changed": moved},
        "load_seconds": loads,
        **vllm_report.summary(rounds, options.new_tokens),
        "verdicts": verdicts,
        "agreements": agreements,
        "failed": failed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        report = measure(options, arguments)
        print(vllm_report.markdown(report))
        if options.results:
            vllm_report.write(report, options.results)
    except FurinaError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report))
    if not report["load_seconds"]:
        sys.exit(f"error: no engine ran: {next(iter(report['failed'].values()))}")


if __name__ == "__main__":
    main()
