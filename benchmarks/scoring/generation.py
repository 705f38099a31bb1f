"""Time furina's written answers beside those of lm-eval's HFLM; the last line is JSON.

    python -m benchmarks.scoring.generation --task gsm8k --protocol cot --rows 32

Both write greedily, in batches of the same size, up to the protocol's stops and longest answer, in
rounds of random order; a ratio is of the two times of one round. In fp32 an answer that differs
makes the exit status 1.
"""

from __future__ import annotations

import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from lm_eval.api.instance import Instance

import furina
from benchmarks.common.command import Parser, Report, run
from benchmarks.common.models import backbone_of
from benchmarks.common.rounds import interleaved, quotients, timed
from benchmarks.scoring.exactness import told
from furina.data.items import data_hash
from furina.data.protocols import Decoding, GenerationProtocol, get_protocol
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.errors import ConfigurationError
from furina.evaluation.generation import generate
from furina.evaluation.hflm import live_model

Texts = list[str]


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    shared = "backbone dtype device rounds threads seed"
    made = Parser(__doc__, shared, dtype="float32", rounds=3)
    made.add_argument("--task", default="gsm8k")
    made.add_argument("--protocol", default="cot", help="a protocol that writes greedily")
    made.add_argument("--rows", type=int, default=32, help="the first rows of the test split")
    made.add_argument("--batch-size", type=int, default=32)
    return made.checked(arguments, "rows rounds batch_size threads")


def asked(options: Namespace) -> tuple[Texts, Decoding, str]:
    """Return the prompts, how they are continued, and the questions' hash.

    Raises ConfigurationError for a protocol whose answers depend on their batch, or has none.
    """
    task, protocol = get_task(options.task), get_protocol(options.protocol)
    if not isinstance(protocol, GenerationProtocol):
        raise ConfigurationError(f"Protocol {options.protocol} writes nothing: choose another.")
    decoding = protocol.decoding(task)
    if decoding.num_beams > 1 or not decoding.pass_mask:
        raise ConfigurationError(f"Protocol {options.protocol} is not greedy: choose another.")
    items = load_items(options.task, "test")[: options.rows]
    return [protocol.context(task, item) for item in items], decoding, data_hash(items)


def peer(lm: Any, prompts: Texts, decoding: Decoding) -> Texts:
    """Return what HFLM writes."""
    rule = {"until": [*decoding.stop], "max_gen_toks": decoding.max_new_tokens, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompt, dict(rule)), index)
        for index, prompt in enumerate(prompts)
    ]
    written: Texts = lm.generate_until(requests, disable_tqdm=True)
    return written


def measure(options: Namespace, command: str) -> Report:
    """Return the report: seconds by round, their ratios, and how many answers differ."""
    prompts, decoding, data = asked(options)
    model = backbone_of(options)
    tokenizer = furina.load_tokenizer(options.backbone)
    with live_model(model, tokenizer, options.batch_size, "lm_eval") as lm:
        writers: dict[str, Callable[[], Texts]] = {
            "hflm": lambda: peer(lm, prompts, decoding),
            "ours": lambda: [
                *generate(model, tokenizer, prompts, decoding, options.batch_size).texts
            ],
        }
        runs = {name: lambda _, write=write: timed(write) for name, write in writers.items()}
        found = interleaved(runs, options.rounds, random.Random(options.seed))
    seconds = {name: [took for took, _ in own] for name, own in found.items()}
    ratios = quotients(seconds["hflm"], seconds["ours"])
    last = (own[-1][1] for own in found.values())
    differing = sum(a != b for a, b in zip(*last, strict=True))
    print(f"{median(ratios):.2f}x, {differing} of {options.rows} answers differ")
    return {
        "ratio": median(ratios),
        "ratios": ratios,
        "seconds": seconds,
        "differing": differing,
        "data": data,
        **told(options),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script; in fp32 exits with 1 where an answer differs."""
    report = run("scoring.generation", parse, measure, arguments=arguments)
    sys.exit(report["settings"]["dtype"] == "float32" and report["differing"] > 0)


if __name__ == "__main__":
    main()
