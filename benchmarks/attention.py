"""Time the attention implementations of transformers by row length; the last line is JSON.

    python benchmarks/attention.py --results results/training
    python benchmarks/attention.py --backbone tiny-llama --lengths 8 16 --tokens 64 --rounds 1

`training` is forward and backward of the frozen backbone, with gradients to its activations;
`forward` builds no graph. Both need logits of a row's last eight real tokens only. In a `_padded`
kind, half of the rows are half as long; all have equal tokens in total, padding among them. An
all-ones mask is given as well where nothing is padded, and sdpa is then called without a mask.

Implementations share the weights. Those of one kind and length run one after another, in an order
that is new in every round; a ratio is the median over rounds of two times of one round.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from command_line import command_line, device
from torch import Tensor, nn
from training import spread
from training_report import Rounds, paired
from training_variants import ANSWER_TOKENS, Batch, Variant, floor, random_batch, twin
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

import furina
from furina.errors import ConfigurationError, FurinaError
from furina.model.inference import logits_at
from furina.records.environment import provenance
from furina.reporting.tables.cells import Cell, Row, build, label, missing
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text
from furina.training.loss import IGNORED, answer_logits, mean_nll, select_answers

KINDS = ("training", "training_padded", "forward", "forward_padded")
BASE = "eager"
SHORTEST = 4
"""A row half as long has still a token to predict."""
Cases = dict[tuple[str, int], dict[str, Variant]]
"""By kind and length, the variant of each implementation."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--dtype", default="bfloat16")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default_device)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--tokens", type=int, default=2048, help="of all rows together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="folder for attention.json and attention.md")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    for length in options.lengths:
        if length < SHORTEST or options.tokens % length or options.tokens < 2 * length:
            rule = f"be {SHORTEST} or larger and divide --tokens into two rows or more"
            parser.error(f"--lengths must {rule}: {length} of {options.tokens} does not")
    return options


def implementations(options: argparse.Namespace) -> list[str]:
    """Return what can run here, the base of the ratios first."""
    # Its kernels are for half precision only.
    flash = options.device.startswith("cuda") and options.dtype in ("bfloat16", "float16")
    return [BASE, "sdpa", *(["flash_attention_2"] if flash and is_flash_attn_2_available() else [])]


def batch_of(kind: str, length: int, vocabulary: int, options: argparse.Namespace) -> Batch:
    """Return `input_ids`, `attention_mask` and `labels`, each (tokens / length, length)."""
    rows, half = options.tokens // length, length // 2
    shape = argparse.Namespace(rows=rows, tokens=length, seed=options.seed)
    batch = random_batch(vocabulary, shape)
    if kind.endswith("_padded"):
        ids, mask, labels = (tensor[: rows // 2] for tensor in batch.values())
        mask[:, half:] = 0
        answer = slice(max(half - ANSWER_TOKENS, 0), half)
        labels.fill_(IGNORED)[:, answer] = ids[:, answer]
    return {key: tensor.to(options.device) for key, tensor in batch.items()}


def make(kind: str, name: str, backbone: nn.Module, batch: Batch) -> Variant:
    """Return a kind's step on a twin of the backbone; raises ConfigurationError if it cannot be."""
    model = cast(PreTrainedModel, twin(backbone))
    # Some models refuse with an error, others with a warning: what counts is what they did.
    with contextlib.suppress(ImportError, ValueError):
        model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ConfigurationError(f"{type(model).__name__} cannot use {name} attention.")
    answers = select_answers(batch)
    if kind.startswith("training"):
        return floor(model, answers)

    @torch.no_grad()
    def forward() -> Tensor:
        return mean_nll(*answer_logits(model, answers))

    return Variant(forward, nn.Module.eval(model), trainable=0)


@torch.no_grad()
def apart(one: nn.Module, base: nn.Module, batch: Batch) -> dict[str, float]:
    """Return the largest |difference| of logits on real tokens, and the base's largest |logit|."""
    real = batch["attention_mask"].flatten().nonzero().squeeze(1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    y, z = (logits_at(model, real, **inputs) for model in (one, base))  # (n, V)
    # Row by row, as a wide copy of them all would take gigabytes.
    rows = [(a.double() - b.double()).abs().max() for a, b in zip(y, z, strict=True)]
    return {"difference": torch.stack(rows).max().item(), "largest_logit": z.abs().max().item()}


def prepare(options: argparse.Namespace) -> tuple[Cases, dict[str, dict[str, float]]]:
    """Return the variants, and how far each forward's logits are from the base's."""
    backbone = furina.load_backbone(options.backbone, options.dtype, options.device)
    backbone.requires_grad_(False)
    cases: Cases = {}
    found: dict[str, dict[str, float]] = {}
    names = implementations(options)
    for kind, length in ((kind, length) for kind in KINDS for length in options.lengths):
        batch = batch_of(kind, length, backbone.config.vocab_size, options)
        case = {name: make(kind, name, backbone, batch) for name in names}
        cases[kind, length] = case
        for name in names[1:] if kind.startswith("forward") else ():
            key = f"{kind}/{name}/{BASE}/{length}"
            found[key] = apart(case[name].model, case[BASE].model, batch)
    return cases, found


def time_rounds(cases: Cases, rounds: int, seed: int) -> Rounds:
    """Run every variant once to warm up, then once a round; return seconds by kind/name/length."""
    seconds: Rounds = {f"{k}/{name}/{n}": [] for (k, n), case in cases.items() for name in case}
    order = random.Random(seed)
    for number in range(rounds + 1):
        for kind, length in order.sample(list(cases), k=len(cases)):
            case = cases[kind, length]
            for name in order.sample(list(case), k=len(case)):
                took = case[name].seconds()
                if number:
                    seconds[f"{kind}/{name}/{length}"].append(took)
        print(f"round {number} of {rounds}" if number else "warm", flush=True)
    return seconds


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Measure what the options ask for; return the report."""
    torch.set_num_threads(options.threads)
    cases, logits_apart = prepare(options)
    rounds = time_rounds(cases, options.rounds, options.seed)
    ratios: dict[str, float] = {}
    fastest: dict[str, str] = {}
    for (kind, n), case in cases.items():
        own = {name: rounds[f"{kind}/{name}/{n}"] for name in case}
        to_base = {name: paired([own], name, BASE) for name in case}
        fastest[f"{kind}/{n}"] = min(to_base, key=to_base.__getitem__)
        ratios |= {f"{kind}/{x}/{BASE}/{n}": to_base[x] for x in case if x != BASE}
    return {
        "settings": {key: value for key, value in vars(options).items() if key != "results"},
        "environment": asdict(provenance()),
        "command": command_line("attention.py", arguments),
        "seconds": {key: spread(values) for key, values in rounds.items()},
        "rounds": rounds,
        "ratios": ratios,
        "fastest": fastest,
        "logits_apart": logits_apart,
    }


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report's table, a row for each ratio."""
    settings, environment = report["settings"], report["environment"]
    hardware, packages = environment["hardware"], environment["packages"]
    changed = " with uncommitted changes" if environment["dirty"] else ""
    remarks = (
        f"{settings['tokens']} tokens in total, {settings['backbone']} in {settings['dtype']}; "
        f"rounds: {settings['rounds']}; a ratio is the median of the rounds' own.",
        f"{hardware['accelerator'] or hardware['cpu']}, threads: {settings['threads']}; "
        f"torch {packages['torch']}, transformers {packages['transformers']}; "
        f"commit {(environment['commit'] or 'unknown')[:10]}{changed}.",
        f"Made by: {report['command']}",
    )
    rows = [_row(report, key) for key in report["ratios"]]
    table = build("attention", "Attention", rows, remarks)
    return f"## {table.title}\n\n{render(table)}"


def _row(report: Mapping[str, Any], key: str) -> Row:
    kind, name, base, length = key.split("/")
    seconds = {x: report["seconds"][f"{kind}/{x}/{length}"]["median"] for x in (name, base)}
    logits, ratio = report["logits_apart"].get(key), report["ratios"][key]
    difference = logits["difference"] if logits else None
    return {
        ("", "kind"): label(kind),
        ("", "length"): Cell(length, {"": int(length)}),
        ("", "implementation"): label(name),
        ("", "ms"): Cell(f"{1e3 * seconds[name]:.1f}", {"": seconds[name]}),
        ("", f"ms of {base}"): Cell(f"{1e3 * seconds[base]:.1f}", {"": seconds[base]}),
        ("", "ratio"): Cell(f"{ratio:.2f}", {"": ratio}),
        ("", "logits apart"): Cell(f"{difference:.2g}", {"": difference}) if logits else missing(),
        ("", "fastest"): label(report["fastest"][f"{kind}/{length}"]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        report = measure(options, arguments)
        if options.results:
            write_json(options.results / "attention.json", report)
            write_text(options.results / "attention.md", markdown(report))
    except FurinaError as error:
        sys.exit(f"error: {error}")
    print(*(f"{key:<44} {value:5.2f}x" for key, value in report["ratios"].items()), sep="\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
