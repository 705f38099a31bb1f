"""Does a score depend on batch size or engine? In fp32 it must not; in bf16 it is told by how much.

    python benchmarks/independence.py --rows 150

Every variant scores the same questions of protocol `text`. In fp32, log-likelihoods may differ by
1e-3 and predictions only where the two best answers are closer than that. In bf16 a prediction may
change only where the gap of the two best answers in fp32 is below twice the error of a bf16
log-likelihood, measured at batch size 1 through lm-eval. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from furina.backbones.load import load_backbone, load_tokenizer
from furina.data.items import data_hash
from furina.data.sources import load_items
from furina.evaluation.evaluate import evaluate
from furina.evaluation.samples import ChoiceSample

VARIANTS = [("lm_eval", 1), ("lm_eval", 8), ("shared", 1), ("shared", 8), ("shared", 32)]
TOLERANCE = 1e-3
Samples = Sequence[ChoiceSample]


def score(dtype: str, options: argparse.Namespace) -> dict[str, Samples]:
    """Return the samples of every variant."""
    model = load_backbone(options.backbone, dtype)
    tokenizer = load_tokenizer(options.backbone)
    items = load_items(options.task, "test")[: options.rows]
    found = {}
    for engine, batch_size in VARIANTS:
        settings: dict[str, Any] = {"engine": engine, "batch_size": batch_size}
        evaluation = evaluate(model, tokenizer, options.task, items, "text", **settings)
        found[f"{engine} {batch_size}"] = evaluation.samples
    return found


def gap(sample: ChoiceSample) -> float:
    """Return the distance between the two best answers."""
    best, second = sorted(sample.loglikelihoods, reverse=True)[:2]
    return best - second


def distance(one: Samples, other: Samples) -> float:
    """Return the largest difference between two scorings' log-likelihoods."""
    return max(
        abs(x - y)
        for a, b in zip(one, other, strict=True)
        for x, y in zip(a.loglikelihoods, b.loglikelihoods, strict=True)
    )


def compare(one: Samples, other: Samples, exact: Samples, allowed: float) -> dict[str, Any]:
    """Describe how two scorings differ; `exact` are the fp32 samples that give each gap."""
    rows = list(zip(one, other, exact, strict=True))
    flips = [(a.id, gap(e)) for a, b, e in rows if a.prediction["acc"] != b.prediction["acc"]]
    right = [sum(sample.correct["acc"] for sample in samples) for samples in (one, other)]
    return {
        "max_difference": distance(one, other),
        "flips": [{"id": name, "fp32_gap": value} for name, value in flips],
        "forbidden": sum(value > allowed for _, value in flips),
        "score_difference": (right[1] - right[0]) / len(one),
    }


def main() -> None:
    """Score, compare every variant with the first, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct")
    parser.add_argument("--task", default="arc_easy")
    parser.add_argument("--rows", type=int, default=150)
    options = parser.parse_args()
    exact, rounded = score("float32", options), score("bfloat16", options)
    first = f"{VARIANTS[0][0]} {VARIANTS[0][1]}"
    error = distance(exact[first], rounded[first])
    result: dict[str, Any] = {
        "task": options.task,
        "rows": options.rows,
        "rows_sha256": data_hash(load_items(options.task, "test")[: options.rows]),
        "bfloat16_error": error,
    }
    failed = False
    limits = {"float32": (exact, TOLERANCE), "bfloat16": (rounded, 2 * error)}
    for dtype, (found, allowed) in limits.items():
        result[dtype] = {}
        for name in list(found)[1:]:
            told = compare(found[first], found[name], exact[first], allowed)
            result[dtype][name] = told
            print(
                f"{dtype:<9} {name:<10} against {first}: max difference "
                f"{told['max_difference']:.2e}, {len(told['flips'])} predictions differ, "
                f"{told['forbidden']} of them forbidden, score {told['score_difference']:+.4f}"
            )
            failed |= told["forbidden"] > 0
            failed |= dtype == "float32" and told["max_difference"] > TOLERANCE
    print(json.dumps(result))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
