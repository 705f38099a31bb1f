"""Does a score depend on batch size or engine? In fp32 it must not; in bf16 it is told by how much.

    python -m benchmarks.scoring.independence --rows 150

Every variant scores the same questions of protocol `text`. In fp32, log-likelihoods may differ by
1e-3 and predictions only where the two best answers are closer than that. In bf16 a prediction may
change only where the gap of the two best answers in fp32 is below twice the error of a bf16
log-likelihood, measured at batch size 1 through lm-eval. The last line is JSON.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from benchmarks.common.command import Parser, Report, run
from benchmarks.scoring import exactness
from benchmarks.scoring.exactness import GAP, lead
from furina.backbones.load import load_backbone, load_tokenizer
from furina.data.items import data_hash
from furina.data.sources import load_items
from furina.evaluation.evaluate import evaluate

VARIANTS = [("lm_eval", 1), ("lm_eval", 8), ("shared", 1), ("shared", 8), ("shared", 32)]
Samples = Sequence[Any]


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone")
    made.add_argument("--task", default="arc_easy")
    made.add_argument("--rows", type=int, default=150)
    return made.checked(arguments, "rows")


def score(dtype: str, items: Any, options: Namespace) -> dict[str, Samples]:
    """Return the samples of every variant."""
    model = load_backbone(options.backbone, dtype)
    tokenizer = load_tokenizer(options.backbone)
    found: dict[str, Samples] = {}
    for engine, batch_size in VARIANTS:
        settings: dict[str, Any] = {"engine": engine, "batch_size": batch_size}
        evaluation = evaluate(model, tokenizer, options.task, items, "text", **settings)
        found[f"{engine} {batch_size}"] = evaluation.samples
    return found


def distance(one: Samples, other: Samples) -> float:
    """Return the largest difference between two scorings' log-likelihoods."""
    pairs = zip(one, other, strict=True)
    return max(exactness.distance(a.loglikelihoods, b.loglikelihoods) for a, b in pairs)


def compare(one: Samples, other: Samples, exact: Samples, allowed: float) -> Report:
    """Describe how two scorings differ; `exact` are the fp32 samples that give each gap."""
    flips = [
        {"id": a.id, "fp32_gap": lead(e.loglikelihoods)}
        for a, b, e in zip(one, other, exact, strict=True)
        if a.prediction["acc"] != b.prediction["acc"]
    ]
    right = [sum(sample.correct["acc"] for sample in samples) for samples in (one, other)]
    return {
        "max_difference": distance(one, other),
        "flips": flips,
        "forbidden": sum(flip["fp32_gap"] > allowed for flip in flips),
        "score_difference": (right[1] - right[0]) / len(one),
    }


def measure(options: Namespace, command: str) -> Report:
    """Score, and compare every variant with the first."""
    items = load_items(options.task, "test")[: options.rows]
    exact, rounded = (score(dtype, items, options) for dtype in ("float32", "bfloat16"))
    first, *others = exact
    error = distance(exact[first], rounded[first])
    report: Report = {
        "task": options.task,
        "rows": options.rows,
        "rows_sha256": data_hash(items),
        "bfloat16_error": error,
    }
    limits = {"float32": (exact, GAP), "bfloat16": (rounded, 2 * error)}
    for dtype, (found, allowed) in limits.items():
        report[dtype] = {
            name: compare(found[first], found[name], exact[first], allowed) for name in others
        }
        for name, told in report[dtype].items():
            print(
                f"{dtype:<9} {name:<10} against {first}: max difference "
                f"{told['max_difference']:.2e}, {len(told['flips'])} predictions differ, "
                f"{told['forbidden']} of them forbidden, score {told['score_difference']:+.4f}"
            )
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; exits with 1 where a score depends on what it must not."""
    report = run("scoring.independence", parse, measure, arguments=arguments)
    every = [told for dtype in ("float32", "bfloat16") for told in report[dtype].values()]
    far = any(told["max_difference"] > GAP for told in report["float32"].values())
    sys.exit(far or any(told["forbidden"] for told in every))


if __name__ == "__main__":
    main()
