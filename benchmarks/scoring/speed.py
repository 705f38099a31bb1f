"""Time furina's scoring against lm-eval's HFLM on the same requests; the last line is JSON.

    python -m benchmarks.scoring.speed --tasks arc_easy openbookqa hellaswag boolq --rows 100

HFLM runs with its logits cache on, at the batch size that was fastest on some of the rows. Both
score in the same run, in rounds of random order; ratios are of the two times of one round. In fp32
a log-likelihood that differs by more than 1e-3, or a prediction whose two best choices are further
apart than that, makes the exit status 1.
"""

from __future__ import annotations

import math
import random
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import furina
from benchmarks.common.command import Parser, Report, run
from benchmarks.common.models import backbone_of
from benchmarks.common.rounds import interleaved, quotients, timed
from benchmarks.scoring.exactness import GAP, distance, lead, told
from furina.data.encoding import encode_pair
from furina.data.items import Question, data_hash
from furina.data.protocols import ChoiceProtocol, get_protocol
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.evaluation.hflm import live_model

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
Request = tuple[tuple[str, str], list[int], list[int]]
Answers = list[tuple[float, bool]]


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone dtype device rounds threads seed", dtype="float32")
    tasks = ["arc_easy", "openbookqa", "hellaswag", "boolq"]
    made.add_argument("--tasks", nargs="+", default=tasks)
    made.add_argument("--protocol", default="text", help="a protocol that compares answers")
    made.add_argument("--rows", type=int, default=100, help="the first rows of the test split")
    made.add_argument("--tuning-rows", type=int, default=24, help="to find HFLM's batch size on")
    made.add_argument("--batch-size", type=int, default=32, help="of ours: rows, at most")
    return made.checked(arguments, "rows rounds tuning_rows batch_size threads")


def requests_of(
    task: str, questions: Sequence[Any], protocol: str, tokenizer: Any
) -> list[Request]:
    """Return a request for each answer of each question."""
    found, asked = get_task(task), get_protocol(protocol)
    assert isinstance(asked, ChoiceProtocol)
    pairs = (
        (asked.context(found, question), answer)
        for question in questions
        for answer in asked.answers(found, question)
    )
    return [(pair, *encode_pair(tokenizer, *pair)) for pair in pairs]


def score(lm: Any, requests: Sequence[Request], batch_size: int) -> Answers:
    """Return each request's log-likelihood, and whether it is the greedy one."""
    lm.batch_size_per_gpu = batch_size
    answers: Answers = lm._loglikelihood_tokens(list(requests), disable_tqdm=True)
    return answers


def best_batch_size(lm: Any, requests: Sequence[Request]) -> int:
    """Return HFLM's fastest batch size: the better of two runs each, after one to warm up."""
    score(lm, requests[:8], 4)
    seconds = {
        size: min(timed(partial(score, lm, requests, size))[0] for _ in range(2))
        for size in BATCH_SIZES
    }
    print("  HFLM by batch size:", {size: f"{value:.2f} s" for size, value in seconds.items()})
    return min(seconds, key=seconds.__getitem__)


def compare(theirs: Answers, ours: Answers, questions: Sequence[Question]) -> Report:
    """Return max |Δ|, the predictions that differ, and those of them that are no near-ties."""
    differing = beyond = start = 0
    for question in questions:
        stop = start + len(question.choices)
        one, other = ([value for value, _ in run[start:stop]] for run in (theirs, ours))
        if one.index(max(one)) != other.index(max(other)):
            differing += 1
            beyond += lead(one) > GAP
        start = stop
    apart = distance([value for value, _ in theirs], [value for value, _ in ours])
    return {"max_difference": apart, "differing": differing, "differing_beyond_gap": beyond}


def measure_task(
    task: str, lms: dict[str, Any], tokenizer: Any, options: Namespace, order: Any
) -> Report:
    """Time both on one task and compare what they say."""
    questions: Any = load_items(task, "test")[: options.rows]
    data = data_hash(questions)
    print(f"{task}: {len(questions)} rows, data {data[:12]}", flush=True)
    requests = requests_of(task, questions, options.protocol, tokenizer)
    few = requests[: options.tuning_rows * (len(requests) // len(questions))]
    sizes = {"hflm": best_batch_size(lms["hflm"], few), "shared": options.batch_size}
    score(lms["shared"], requests[:8], sizes["shared"])  # HFLM is warm too
    runs = {
        name: lambda _, name=name: timed(lambda: score(lms[name], requests, sizes[name]))
        for name in lms
    }
    found = interleaved(runs, options.rounds, order)
    seconds = {name: [took for took, _ in own] for name, own in found.items()}
    compared = compare(found["hflm"][-1][1], found["shared"][-1][1], questions)
    ratio = median(quotients(seconds["hflm"], seconds["shared"]))
    print(
        f"  HFLM (batch size {sizes['hflm']}) {median(seconds['hflm']):.2f} s   ours "
        f"{median(seconds['shared']):.2f} s   {ratio:.2f}x   max |Δ| "
        f"{compared['max_difference']:.1e}   predictions that differ {compared['differing']}, "
        f"beyond {GAP:g} {compared['differing_beyond_gap']}",
        flush=True,
    )
    own = {"data": data, "seconds": seconds, "hflm_batch_size": sizes["hflm"], "ratios": ratio}
    return own | compared


def measure(options: Namespace, command: str) -> Report:
    """Time all tasks; return the report."""
    model = backbone_of(options)
    tokenizer = furina.load_tokenizer(options.backbone)
    order = random.Random(options.seed)
    with (
        live_model(model, tokenizer, 1, "lm_eval") as hflm,
        live_model(model, tokenizer, options.batch_size, "shared") as shared,
    ):
        hflm.logits_cache = True
        lms = {"hflm": hflm, "shared": shared}
        tasks = {t: measure_task(t, lms, tokenizer, options, order) for t in options.tasks}
    keys = next(iter(tasks.values()))
    report = {key: {task: found[key] for task, found in tasks.items()} for key in keys}
    report["ratios"]["geometric mean"] = math.prod(report["ratios"].values()) ** (1 / len(tasks))
    print(f"geometric mean {report['ratios']['geometric mean']:.2f}x")
    return report | told(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; in fp32 exits with 1 where the two are apart."""
    report = run("scoring.speed", parse, measure, arguments=arguments)
    exact = report["settings"]["dtype"] == "float32"
    far = max(report["max_difference"].values()) > GAP
    sys.exit(exact and (far or any(report["differing_beyond_gap"].values())))


if __name__ == "__main__":
    main()
