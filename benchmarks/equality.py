"""Compare furina's scoring with lm-eval's HFLM on lm-eval's own tasks; the last line is JSON.

    python benchmarks/equality.py --rows 300

Every task is lm-eval's, untouched, on the first rows of the test split, in fp32; question by
question. Exits with 1 if a log-likelihood differs by more than 1e-3, or a prediction whose two best
choices are further apart than that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import lm_eval
import torch
import transformers

import furina
from furina.data.items import data_hash
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.evaluation.builtin import BuiltinSample, BuiltinScore, builtin

TASKS = (
    *("arc_easy", "arc_challenge", "openbookqa", "hellaswag", "piqa"),
    *("winogrande", "boolq", "commonsense_qa"),
)
GAP = 1e-3


@dataclass(frozen=True)
class Comparison:
    """One task: how far the engines' log-likelihoods are apart, and what each scores."""

    rows: int
    data: str
    max_difference: float
    differing: int
    differing_beyond_gap: int
    scores: dict[str, dict[str, float]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def gap(sample: BuiltinSample) -> float:
    best, second = sorted(sample.loglikelihoods, reverse=True)[:2]
    return best - second


def compare(model, tokenizer, name: str, options: argparse.Namespace) -> Comparison:
    task = get_task(name)
    questions = load_items(name, "test")[: options.rows]
    assert task.harness and task.harness_row
    rows = {task.harness: [task.harness_row(question) for question in questions]}
    found: dict[str, Sequence[BuiltinScore]] = {
        engine: builtin(
            *(model, tokenizer, [task.harness]),
            batch_size=options.batch_size,
            rows=rows,
            engine=engine,
        )
        for engine in ("lm_eval", "shared")
    }
    pairs = list(zip(found["lm_eval"][0].samples, found["shared"][0].samples, strict=True))
    assert len(pairs) == len(questions)
    differing = [one for one, other in pairs if one.prediction != other.prediction]
    return Comparison(
        rows=len(questions),
        data=data_hash(questions),
        max_difference=max(
            abs(a - b)
            for one, other in pairs
            for a, b in zip(one.loglikelihoods, other.loglikelihoods, strict=True)
        ),
        differing=len(differing),
        differing_beyond_gap=sum(gap(sample) > GAP for sample in differing),
        scores={
            engine: {score.metric: score.value for score in scores}
            for engine, scores in found.items()
        },
    )


def line(name: str, result: Comparison) -> str:
    return (
        f"{name:<15} {result.rows} rows, data {result.data[:12]}   max |Δ| "
        f"{result.max_difference:.1e}   predictions that differ {result.differing}, beyond "
        f"{GAP:g} {result.differing_beyond_gap}   {result.scores}"
    )


def main() -> None:
    options = parse()
    model = furina.load_backbone(options.backbone, options.dtype, options.device)
    tokenizer = furina.load_tokenizer(options.backbone)
    results: dict[str, Comparison] = {}
    for name in options.tasks:
        results[name] = compare(model, tokenizer, name, options)
        print(line(name, results[name]), flush=True)
    modules = (torch, transformers, lm_eval)
    versions = {module.__name__: module.__version__ for module in modules}
    tasks = {name: asdict(result) for name, result in results.items()}
    print(json.dumps({"tasks": tasks, "settings": vars(options), "versions": versions}))
    sys.exit(any(r.differing_beyond_gap or r.max_difference > GAP for r in results.values()))


if __name__ == "__main__":
    main()
