"""Time the attention implementations of transformers by row length; the last line is JSON.

    python -m benchmarks.training.attention --results results/training
    python -m benchmarks.training.attention --backbone tiny-llama --lengths 8 16 --tokens 64

`training` is forward and backward of the frozen backbone, with gradients to its activations;
`forward` builds no graph. Both need logits of a row's last eight real tokens only. In a `_padded`
kind, half of the rows are half as long; all have equal tokens in total, padding among them. An
all-ones mask is given as well where nothing is padded, and sdpa is then called without a mask.

Implementations share the weights. Those of one kind and length run one after another, in an order
that is new in every round; a ratio is the median over rounds of two times of one round.
"""

from __future__ import annotations

import contextlib
import random
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import is_flash_attn_2_available

from benchmarks.common import show
from benchmarks.common.command import Parser, Report, described, run
from benchmarks.common.models import backbone_of, twin
from benchmarks.common.rounds import interleaved, quotients, spread
from benchmarks.training.variants import ANSWER_TOKENS, Variant, floor, random_batch
from furina.data.batches import IGNORED, Batch
from furina.errors import ConfigurationError
from furina.model.inference import logits_at
from furina.training.loss import answer_logits, mean_nll, select_answers

KINDS = ("training", "training_padded", "forward", "forward_padded")
BASE = "eager"
SHORTEST = 4
"""A row half as long has still a token to predict."""
Cases = dict[tuple[str, int], dict[str, Variant]]
"""By kind and length, the variant of each implementation."""


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone dtype device rounds threads seed results")
    made.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    made.add_argument("--tokens", type=int, default=2048, help="of all rows together")
    options = made.checked(arguments, "rounds threads")
    for length in options.lengths:
        if length < SHORTEST or options.tokens % length or options.tokens < 2 * length:
            rule = f"be {SHORTEST} or larger and divide --tokens into two rows or more"
            made.error(f"--lengths must {rule}: {length} of {options.tokens} does not")
    return options


def implementations(options: Namespace) -> list[str]:
    """Return what can run here, the base of the ratios first."""
    # Its kernels are for half precision only.
    flash = options.device.startswith("cuda") and options.dtype in ("bfloat16", "float16")
    return [BASE, "sdpa", *(["flash_attention_2"] if flash and is_flash_attn_2_available() else [])]


def batch_of(kind: str, length: int, vocabulary: int, options: Namespace) -> Batch:
    """Return `input_ids`, `attention_mask` and `labels`, each (tokens / length, length)."""
    rows, half = options.tokens // length, length // 2
    batch = random_batch(vocabulary, rows, length, options.seed)
    if kind.endswith("_padded"):
        ids, mask, labels = (tensor[: rows // 2] for tensor in batch.values())
        mask[:, half:] = 0
        answer = slice(max(half - ANSWER_TOKENS, 0), half)
        labels.fill_(IGNORED)[:, answer] = ids[:, answer]
    return {key: tensor.to(options.device) for key, tensor in batch.items()}


def make(kind: str, name: str, backbone: nn.Module, batch: Batch) -> Variant:
    """Return a kind's step on a twin of the backbone; raises ConfigurationError if it cannot be."""
    model: Any = twin(backbone)
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
def apart(one: Any, base: Any, batch: Batch) -> dict[str, float]:
    """Return the largest |difference| of logits on real tokens, and the base's largest |logit|."""
    real = batch["attention_mask"].flatten().nonzero().squeeze(1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    y, z = (logits_at(model, real, **inputs) for model in (one, base))  # (n, V)
    # Row by row, as a wide copy of them all would take gigabytes.
    rows = [(a.double() - b.double()).abs().max() for a, b in zip(y, z, strict=True)]
    return {"difference": torch.stack(rows).max().item(), "largest_logit": z.abs().max().item()}


def prepare(options: Namespace) -> tuple[Cases, dict[str, dict[str, float]]]:
    """Return the variants, and how far each forward's logits are from the base's."""
    backbone = backbone_of(options)
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


def time_case(case: dict[str, Variant], order: random.Random, number: int) -> dict[str, float]:
    """Step each implementation once, in a new order; return the seconds."""
    return {name: case[name].step()[0] for name in order.sample(list(case), k=len(case))}


def measure(options: Namespace, command: str) -> Report:
    """Measure what the options ask for; return the report."""
    cases, logits_apart = prepare(options)
    order = random.Random(options.seed)
    runs = {f"{kind}/{n}": partial(time_case, case, order) for (kind, n), case in cases.items()}
    timed = interleaved(runs, options.rounds + 1, order)
    rounds: dict[str, list[float]] = {}
    ratios: dict[str, float] = {}
    fastest: dict[str, str] = {}
    for (kind, n), case in cases.items():
        own = {name: [each[name] for each in timed[f"{kind}/{n}"][1:]] for name in case}
        to_base = {name: median(quotients(own[name], own[BASE])) for name in case}
        rounds |= {f"{kind}/{name}/{n}": seconds for name, seconds in own.items()}
        ratios |= {f"{kind}/{name}/{BASE}/{n}": to_base[name] for name in case if name != BASE}
        fastest[f"{kind}/{n}"] = min(to_base, key=to_base.__getitem__)
    return {
        **described(options, command),
        "seconds": {key: spread(values) for key, values in rounds.items()},
        "rounds": rounds,
        "ratios": ratios,
        "fastest": fastest,
        "logits_apart": logits_apart,
    }


def page(report: show.Report) -> show.Page:
    """Return the report's table, a row for each ratio."""
    settings = report["settings"]
    remarks = (
        f"{settings['tokens']} tokens in total, {settings['backbone']} in {settings['dtype']}; "
        f"rounds: {settings['rounds']}; a ratio is the median of the rounds' own.",
        f"{show.processor(report)}, threads: {settings['threads']}; "
        f"{show.versions(report, 'torch', 'transformers')}; {show.commit(report)}.",
        f"Made by: {report['command']}",
    )
    rows = []
    for key, ratio in report["ratios"].items():
        kind, name, base, length = key.split("/")
        seconds = {x: report["seconds"][f"{kind}/{x}/{length}"]["median"] for x in (name, base)}
        row = {"kind": kind, "length": int(length), "name": name, "ratio": ratio}
        row |= {"own": seconds[name], "base": seconds[base]}
        row |= {"apart": show.found(report["logits_apart"].get(key), "difference")}
        rows.append(row | {"fastest": report["fastest"][f"{kind}/{length}"]})
    columns: show.Columns = {
        ("", "kind"): "kind",
        ("", "length"): "length d",
        ("", "implementation"): "name",
        ("", "ms"): show.at("own .1f", 1e3),
        ("", f"ms of {BASE}"): show.at("base .1f", 1e3),
        ("", "ratio"): "ratio .2f",
        ("", "logits apart"): "apart .2g",
        ("", "fastest"): "fastest",
    }
    return show.Page([show.table("attention", "Attention", rows, columns, *remarks)])


main = partial(run, "training.attention", parse, measure, "attention", page)

if __name__ == "__main__":
    main()
