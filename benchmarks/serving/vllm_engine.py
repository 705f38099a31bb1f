"""Serve the base, the merged model and the LoRA with vLLM: times and correctness; JSON comes last.

    make vllm
    python -m benchmarks.serving.vllm_engine --results results/vllm
    python -m benchmarks.serving.vllm_engine --adapter-path runs/demo/adapter --rounds 5
    python -m benchmarks.serving.vllm_engine --dtype float32 --rounds 0

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

import os
import random
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import furina
from benchmarks.common.command import Parser, Report, described, run
from benchmarks.common.rounds import Failed, interleaved, make_each
from benchmarks.common.worker import ROOT, Worker, WorkerError, interpreter
from benchmarks.serving import vllm_page
from benchmarks.serving.vllm_checks import Reference, agreement, changed, told, verdict
from benchmarks.serving.vllm_models import (
    EXACT,
    RANDOM,
    Exports,
    Tokens,
    continuations,
    export,
    prompts,
    reference,
)
from furina.evaluation.latency import Timing

WORKER = Path(__file__).with_name("vllm_worker.py")
ENVIRONMENT = ROOT / ".venv-vllm"
VARIANTS = ("base", "merged", "adapter", "base_again")
CHECKED = VARIANTS[:3]
MEMORY_SHARE = 0.2
"""Of an accelerator, for each engine."""
PROCESS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else the number of threads is not ours to say
}
"""What an engine's environment variables say."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""
Engines = dict[str, Worker]
Answers = dict[str, dict[str, Any]]
"""By variant: the scores of the rows and the tokens generated after the prompts."""


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone device rank experts rounds seed results", rounds=20)
    made.add_argument("--adapter-path", type=Path, help="a saved furina adapter")
    made.add_argument("--dtype", choices=tuple(EXACT), default="bfloat16")
    made.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    made.add_argument("--relative-update", type=float, default=0.03, help="|ΔW|/|W|")
    made.add_argument("--prompt-tokens", type=int, default=100)
    made.add_argument("--new-tokens", type=int, default=100)
    made.add_argument("--warmup", type=int, default=2, help="untimed rounds before")
    made.add_argument("--rows", type=int, default=32, help="of text that are scored")
    made.add_argument("--row-tokens", type=int, default=64, help="of a scored row")
    made.add_argument("--generations", type=int, default=8, help="compared with transformers'")
    made.add_argument("--task", default="arc_easy", help=f"whose text is read, or {RANDOM}")
    threads = max(1, (os.cpu_count() or 1) - 1)  # as vLLM itself chooses: one is for the rest
    made.add_argument("--threads", type=int, default=threads, help="of each engine's model")
    made.add_argument("--vllm", type=Path, default=ENVIRONMENT, help="its environment")
    least = {"new_tokens": 2, "row_tokens": 2, "rounds": 0, "warmup": 0}
    options = made.checked(arguments, "prompt_tokens rows generations experts threads", **least)
    if options.relative_update <= 0:
        made.error("--relative-update must be positive")
    return options


def start(exports: Exports, failed: Failed, options: Namespace) -> Engines:
    """Load every variant in a fresh process; one that fails is noted and left out."""

    def load(name: str) -> Worker:
        loaded = engine(options.vllm, options.threads, setup(name, exports, options))
        print(f"{name}: loaded in {loaded.loaded['seconds']:.1f} s", flush=True)
        return loaded

    return make_each([name for name in VARIANTS if name in options.only], load, failed)


def setup(name: str, exports: Exports, options: Namespace) -> dict[str, Any]:
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


def engine(environment: Path, threads: int, setup: dict[str, Any]) -> Worker:
    """Start a fresh worker and load what `setup` says, see vllm_worker.Engine."""
    return Worker("vLLM", environment, WORKER, setup, **PROCESS, OMP_NUM_THREADS=str(threads))


def room_for(rank: int) -> int:
    """Return the smallest rank that vLLM makes room for and that holds `rank`.

    Raises WorkerError if there is none.
    """
    found = next((each for each in RANKS if each >= rank), None)
    if found is None:
        raise WorkerError(f"vLLM holds adapters up to rank {RANKS[-1]}, and this has rank {rank}")
    return found


def time_rounds(
    engines: Engines, failed: Failed, vocabulary: int, options: Namespace
) -> dict[str, list[dict[str, float]]]:
    """Time each engine once a round, all on the same new prompt; return the warm rounds' times.

    One that fails is left out of all rounds and ended.
    """
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.warmup + options.rounds if options.rounds else 0, options.prompt_tokens)
    asked = torch.randint(vocabulary, shape, generator=generator).tolist()

    def times(name: str, number: int) -> dict[str, float]:
        seconds = engines[name].ask("times", asked[number], options.new_tokens)
        if len(seconds) != options.new_tokens:
            wrong = f"vLLM generated {len(seconds)} tokens, not {options.new_tokens}"
            raise WorkerError(wrong)
        return Timing.of_steps(seconds)._asdict()

    runs = {name: lambda number, name=name: times(name, number) for name in engines}
    found = interleaved(runs, len(asked), random.Random(options.seed), failed)
    for name in runs.keys() - found:
        engines.pop(name).close()
    return {name: own[options.warmup :] for name, own in found.items()}


def ask(
    engines: Engines, failed: Failed, rows: list[Tokens], asked: list[Tokens], new_tokens: int
) -> Answers:
    """Return what each engine says of the rows and after the prompts."""

    def answer(name: str) -> dict[str, Any]:
        scores = engines[name].ask("score", rows)
        return {"scores": scores, "generated": engines[name].ask("generate", asked, new_tokens)}

    return make_each([name for name in engines if name in CHECKED], answer, failed)


def check(
    answers: Answers, exports: Exports, rows: list[Tokens], options: Namespace
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
    answers: Answers, exports: Exports, asked: list[Tokens], options: Namespace
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


def measure(options: Namespace, command: str) -> Report:
    """Export, ask and compare; return the report.

    Raises FurinaError if the environment is missing, or backbone or adapter cannot be exported.
    """
    interpreter(options.vllm, "vllm")
    failed: Failed = {}
    rows, source = prompts(options.rows, options.row_tokens, options)
    asked, _ = prompts(options.generations, options.prompt_tokens, options)
    vocabulary = len(furina.load_tokenizer(options.backbone))
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        exports = export(Path(folder), options)
        engines = start(exports, failed, options)
        try:
            loads = {name: own.loaded["seconds"] for name, own in engines.items()}
            versions = {k: v for own in engines.values() for k, v in own.versions.items()}
            rounds = time_rounds(engines, failed, vocabulary, options)
            answers = ask(engines, failed, rows, asked, options.new_tokens)
        finally:
            for own in engines.values():
                own.close()
        verdicts, moved = check(answers, exports, rows, options)
        agreements = compare(answers, exports, asked, options)
    report = described(options, command, **versions)
    adapter = options.adapter_path and options.adapter_path.name
    report["settings"] |= {"prompts": source, "adapter": adapter}
    return {
        **report,
        "update": {"relative": exports.relative_update, "rank": exports.rank, "changed": moved},
        "load_seconds": loads,
        **vllm_page.summary(rounds, options.new_tokens),
        "verdicts": verdicts,
        "agreements": agreements,
        "failed": failed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; exits with 1 where no engine ran."""
    page = vllm_page.page
    report = run("serving.vllm_engine", parse, measure, "engine", page, arguments)
    if not report["load_seconds"]:
        sys.exit(f"error: no engine ran: {next(iter(report['failed'].values()))}")


if __name__ == "__main__":
    main()
