"""Compare furina's scoring with lm-eval's HFLM on lm-eval's own tasks; the last line is JSON.

    python benchmarks/equality.py --rows 300

Every task is lm-eval's, untouched, on the first rows of the test split, in fp32; question by
question. HFLM normalises and adds up in fp32, so where the two are more than 1e-3 apart both are
held against the definition in float64. If ours is more than 1e-3 off then, or a prediction differs
where the two best choices are further apart than that, the exit status is 1.
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
from furina.data.encoding import encode_pair
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
class Apart:
    """A question on which the engines are more than GAP apart: each one's distance to float64."""

    doc_id: int
    longest_answer: int
    lm_eval_error: float
    shared_error: float


@dataclass(frozen=True)
class Comparison:
    """One task: how far the engines' log-likelihoods are apart, and what each scores."""

    rows: int
    data: str
    max_difference: float
    apart: list[Apart]
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


def distance(one: BuiltinSample, other: BuiltinSample) -> float:
    pairs = zip(one.loglikelihoods, other.loglikelihoods, strict=True)
    return max(abs(a - b) for a, b in pairs)


def exact(model, tokenizer, sample: BuiltinSample) -> list[float]:
    """Score a question's answers by the definition, in float64 throughout."""
    values = []
    for prompt, answer in zip(sample.prompts, sample.answers, strict=True):
        context, continuation = encode_pair(tokenizer, prompt, answer)
        ids = torch.tensor([[*context, *continuation]], device=model.device)
        with torch.inference_mode():
            terms = model(ids[:, :-1]).logits[0].log_softmax(-1)[-len(continuation) :]
        values.append(terms.gather(1, ids[0, -len(continuation) :, None]).sum().item())
    return values


def held_against_float64(options: argparse.Namespace, tokenizer, pairs: list) -> list[Apart]:
    """Score the questions on which the engines are apart once more, in float64."""
    found = [(one, other) for one, other in pairs if distance(one, other) > GAP]
    if not found:
        return []
    model = furina.load_backbone(options.backbone, "float32", options.device).double().eval()
    apart = []
    for one, other in found:
        true = exact(model, tokenizer, one)
        errors = (
            max(abs(a - b) for a, b in zip(sample.loglikelihoods, true, strict=True))
            for sample in (one, other)
        )
        apart.append(Apart(one.doc_id, max(map(len, one.answers)), *errors))
    return apart


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
        max_difference=max(distance(one, other) for one, other in pairs),
        apart=held_against_float64(options, tokenizer, pairs),
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
        + "".join(
            f"\n  question {a.doc_id}, answer of {a.longest_answer} characters: against float64 "
            f"HFLM is {a.lm_eval_error:.1e} off, ours {a.shared_error:.1e}"
            for a in result.apart
        )
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
    wrong = (a.shared_error > GAP for r in results.values() for a in r.apart)
    sys.exit(any(wrong) or any(r.differing_beyond_gap for r in results.values()))


if __name__ == "__main__":
    main()
