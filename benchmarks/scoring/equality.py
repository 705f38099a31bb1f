"""Compare furina's scoring with lm-eval's HFLM on lm-eval's own tasks; the last line is JSON.

    python -m benchmarks.scoring.equality --rows 300

Every task is lm-eval's, untouched, on the first rows of the test split, in fp32; question by
question. HFLM normalises and adds up in fp32, so where the two are more than 1e-3 apart both are
held against the definition in float64. If ours is more than 1e-3 off then, or a prediction differs
where the two best choices are further apart than that, the exit status is 1.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

import furina
from benchmarks.common.command import Parser, Report, run
from benchmarks.scoring.exactness import GAP, distance, lead, told
from furina.data.encoding import encode_pair
from furina.data.items import data_hash
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.evaluation.builtin import BuiltinSample, BuiltinScore, builtin

TASKS = (
    *("arc_easy", "arc_challenge", "openbookqa", "hellaswag", "piqa"),
    *("winogrande", "boolq", "commonsense_qa"),
)
Pair = tuple[BuiltinSample, BuiltinSample]
"""A question as HFLM and as ours scored it."""


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone dtype device", dtype="float32")
    made.add_argument("--tasks", nargs="+", default=list(TASKS))
    made.add_argument("--rows", type=int, default=300)
    made.add_argument("--batch-size", type=int, default=8)
    return made.checked(arguments, "rows batch_size")


def exact(model: Any, tokenizer: Any, sample: BuiltinSample) -> list[float]:
    """Score a question's answers by the definition, in float64 throughout."""
    values = []
    for prompt, answer in zip(sample.prompts, sample.answers, strict=True):
        context, continuation = encode_pair(tokenizer, prompt, answer)
        ids = torch.tensor([[*context, *continuation]], device=model.device)
        with torch.inference_mode():
            terms = model(ids[:, :-1]).logits[0].log_softmax(-1)[-len(continuation) :]
        values.append(terms.gather(1, ids[0, -len(continuation) :, None]).sum().item())
    return values


def held_against_float64(options: Namespace, tokenizer: Any, pairs: Sequence[Pair]) -> list[Report]:
    """Score once more, in float64, where the engines are apart; return each one's distance."""
    found = [pair for pair in pairs if apart(pair) > GAP]
    if not found:
        return []
    model: Any = furina.load_backbone(options.backbone, "float32", options.device).double()
    told = []
    for theirs, ours in found:
        true = exact(model.eval(), tokenizer, theirs)
        told.append(
            {
                "doc_id": theirs.doc_id,
                "longest_answer": max(map(len, theirs.answers)),
                "lm_eval_error": distance(theirs.loglikelihoods, true),
                "shared_error": distance(ours.loglikelihoods, true),
            }
        )
    return told


def apart(pair: Pair) -> float:
    """Return how far the engines are apart on a question."""
    theirs, ours = pair
    return distance(theirs.loglikelihoods, ours.loglikelihoods)


def compare(model: Any, tokenizer: Any, name: str, options: Namespace) -> Report:
    """Return how far the engines' log-likelihoods are apart on a task, and what each scores."""
    task = get_task(name)
    questions: Any = load_items(name, "test")[: options.rows]
    assert task.harness and task.harness_row
    rows = {task.harness: [task.harness_row(question) for question in questions]}
    sizes: dict[str, Any] = {"batch_size": options.batch_size, "rows": rows}
    found: dict[str, Sequence[BuiltinScore]] = {
        engine: builtin(model, tokenizer, [task.harness], engine=engine, **sizes)
        for engine in ("lm_eval", "shared")
    }
    pairs = list(zip(found["lm_eval"][0].samples, found["shared"][0].samples, strict=True))
    assert len(pairs) == len(questions)
    leads = [lead(one.loglikelihoods) for one, two in pairs if one.prediction != two.prediction]
    return {
        "rows": len(questions),
        "data": data_hash(questions),
        "max_difference": max(map(apart, pairs)),
        "apart": held_against_float64(options, tokenizer, pairs),
        "differing": len(leads),
        "differing_beyond_gap": sum(each > GAP for each in leads),
        "scores": {
            engine: {score.metric: score.value for score in scores}
            for engine, scores in found.items()
        },
    }


def line(name: str, result: Report) -> str:
    """Return what is printed of a task as soon as it is compared."""
    return (
        f"{name:<15} {result['rows']} rows, data {result['data'][:12]}   max |Δ| "
        f"{result['max_difference']:.1e}   predictions that differ {result['differing']}, beyond "
        f"{GAP:g} {result['differing_beyond_gap']}   {result['scores']}"
        + "".join(
            f"\n  question {a['doc_id']}, answer of {a['longest_answer']} characters: against "
            f"float64 HFLM is {a['lm_eval_error']:.1e} off, ours {a['shared_error']:.1e}"
            for a in result["apart"]
        )
    )


def measure(options: Namespace, command: str) -> Report:
    """Compare on all tasks; return the report."""
    model = furina.load_backbone(options.backbone, options.dtype, options.device)
    tokenizer = furina.load_tokenizer(options.backbone)
    results: Report = {}
    for name in options.tasks:
        results[name] = compare(model, tokenizer, name, options)
        print(line(name, results[name]), flush=True)
    return {"tasks": results, **told(options)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; exits with 1 where ours is wrong, or another answer is chosen."""
    results = run("scoring.equality", parse, measure, arguments=arguments)["tasks"].values()
    wrong = any(a["shared_error"] > GAP for result in results for a in result["apart"])
    sys.exit(wrong or any(result["differing_beyond_gap"] for result in results))


if __name__ == "__main__":
    main()
