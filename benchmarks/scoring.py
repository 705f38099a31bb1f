"""Time furina's scoring against lm-eval's HFLM on the same requests; the last line is JSON.

    python benchmarks/scoring.py --tasks arc_easy openbookqa hellaswag boolq --rows 100

HFLM runs with its logits cache on, at the batch size that was fastest on some of the rows. Both
score in the same run, in rounds of random order; ratios are of the two times of one round. In fp32
a log-likelihood that differs by more than 1e-3, or a prediction whose two best choices are further
apart than that, makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM

import furina
from furina.data.encoding import encode_pair
from furina.data.items import Question, data_hash
from furina.data.protocols import ChoiceProtocol, get_protocol
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.evaluation.hflm import live_model

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
GAP = 1e-3
Request = tuple[tuple[str, str], list[int], list[int]]
Answers = list[tuple[float, bool]]
T = TypeVar("T")


@dataclass
class Outcome:
    """One task: the engines' seconds by round, and how far their answers are apart."""

    seconds: dict[str, list[float]]
    hflm_batch_size: int
    difference: float
    differing: int
    differing_beyond_gap: int

    @property
    def ratio(self) -> float:
        """Return the median of HFLM's time over ours, round by round."""
        pairs = zip(self.seconds["hflm"], self.seconds["shared"], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    tasks = ["arc_easy", "openbookqa", "hellaswag", "boolq"]
    parser.add_argument("--tasks", nargs="+", default=tasks)
    parser.add_argument("--protocol", default="text", help="a protocol that compares answers")
    parser.add_argument("--rows", type=int, default=100, help="the first rows of the test split")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tuning-rows", type=int, default=24, help="to find HFLM's batch size on")
    parser.add_argument("--batch-size", type=int, default=32, help="of ours: rows, at most")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def requests_of(
    task: str, questions: Sequence[Question], protocol: str, tokenizer
) -> list[Request]:
    found, asked = get_task(task), get_protocol(protocol)
    assert isinstance(asked, ChoiceProtocol)
    pairs = (
        (asked.context(found, question), answer)
        for question in questions
        for answer in asked.answers(found, question)
    )
    return [(pair, *encode_pair(tokenizer, *pair)) for pair in pairs]


def timed(run: Callable[[], T]) -> tuple[float, T]:
    start = time.perf_counter()
    answers = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, answers


def score(lm: HFLM, requests: Sequence[Request], batch_size: int) -> Answers:
    lm.batch_size_per_gpu = batch_size
    return lm._loglikelihood_tokens(list(requests), disable_tqdm=True)


def best_batch_size(lm: HFLM, requests: Sequence[Request]) -> int:
    """Return HFLM's fastest batch size: the better of two runs each, after one to warm up."""
    score(lm, requests[:8], 4)
    seconds = {
        size: min(timed(lambda size=size: score(lm, requests, size))[0] for _ in range(2))
        for size in BATCH_SIZES
    }
    print("  HFLM by batch size:", {size: f"{value:.2f} s" for size, value in seconds.items()})
    return min(seconds, key=seconds.__getitem__)


def compare(
    theirs: Answers, ours: Answers, questions: Sequence[Question]
) -> tuple[float, int, int]:
    """Return max |Δ|, the predictions that differ, and those of them that are no near-ties."""
    difference = max(abs(a - b) for (a, _), (b, _) in zip(theirs, ours, strict=True))
    differing = beyond = start = 0
    for question in questions:
        stop = start + len(question.choices)
        one, other = ([value for value, _ in run[start:stop]] for run in (theirs, ours))
        best, second = sorted(one, reverse=True)[:2]
        if one.index(max(one)) != other.index(max(other)):
            differing += 1
            beyond += best - second > GAP
        start = stop
    return difference, differing, beyond


def measure(
    lms: dict[str, HFLM], requests: list[Request], questions: list[Question], options, rng
) -> Outcome:
    choices = len(requests) // len(questions)
    sizes = {
        "hflm": best_batch_size(lms["hflm"], requests[: options.tuning_rows * choices]),
        "shared": options.batch_size,
    }
    score(lms["shared"], requests[:8], sizes["shared"])  # HFLM is warm too
    seconds: dict[str, list[float]] = {"hflm": [], "shared": []}
    answers: dict[str, Answers] = {}
    for _ in range(options.rounds):
        for name in rng.sample(list(lms), k=2):
            lm, size = lms[name], sizes[name]
            took, answers[name] = timed(lambda lm=lm, size=size: score(lm, requests, size))
            seconds[name].append(took)
    apart = compare(answers["hflm"], answers["shared"], questions)
    return Outcome(seconds, sizes["hflm"], *apart)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    model = furina.load_backbone(options.backbone, options.dtype, options.device)
    tokenizer = furina.load_tokenizer(options.backbone)
    rng = random.Random(options.seed)
    outcomes: dict[str, Outcome] = {}
    hashes: dict[str, str] = {}
    with (
        live_model(model, tokenizer, 1, "lm_eval") as hflm,
        live_model(model, tokenizer, options.batch_size, "shared") as shared,
    ):
        hflm.logits_cache = True
        for task in options.tasks:
            questions = load_items(task, "test")[: options.rows]
            hashes[task] = data_hash(questions)
            print(f"{task}: {len(questions)} rows, data {hashes[task][:12]}", flush=True)
            requests = requests_of(task, questions, options.protocol, tokenizer)
            lms = {"hflm": hflm, "shared": shared}
            outcome = outcomes[task] = measure(lms, requests, questions, options, rng)
            theirs, ours = (statistics.median(outcome.seconds[name]) for name in lms)
            print(
                f"  HFLM (batch size {outcome.hflm_batch_size}) {theirs:.2f} s   ours {ours:.2f} s"
                f"   {outcome.ratio:.2f}x   max |Δ| {outcome.difference:.1e}   predictions that "
                f"differ {outcome.differing}, beyond {GAP:g} {outcome.differing_beyond_gap}",
                flush=True,
            )
    ratios = {task: outcome.ratio for task, outcome in outcomes.items()}
    ratios["geometric mean"] = math.prod(ratios.values()) ** (1 / len(ratios))
    print(f"geometric mean {ratios['geometric mean']:.2f}x")
    print(json.dumps(report(options, outcomes, hashes, ratios)))
    exact = options.dtype == "float32"
    apart = (o.differing_beyond_gap or o.difference > GAP for o in outcomes.values())
    sys.exit(exact and any(apart))


def report(options, outcomes: dict[str, Outcome], hashes: dict[str, str], ratios) -> dict:
    return {
        "ratios": ratios,
        "settings": vars(options),
        "data": hashes,
        "seconds": {task: outcome.seconds for task, outcome in outcomes.items()},
        "hflm_batch_size": {task: o.hflm_batch_size for task, o in outcomes.items()},
        "max_difference": {task: o.difference for task, o in outcomes.items()},
        "differing": {task: o.differing for task, o in outcomes.items()},
        "versions": {
            module.__name__: module.__version__ for module in (torch, transformers, lm_eval)
        },
    }


if __name__ == "__main__":
    main()
