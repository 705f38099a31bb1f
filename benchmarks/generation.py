"""Time furina's written answers beside those of lm-eval's HFLM; the last line is JSON.

    python benchmarks/generation.py --task gsm8k --protocol cot --rows 32

Both write greedily, in batches of the same size, up to the protocol's stops and longest answer, in
rounds of random order; a ratio is of the two times of one round. In fp32 an answer that differs
makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable

import lm_eval
import torch
import transformers
from command_line import device
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from scoring import timed

import furina
from furina.data.items import data_hash
from furina.data.protocols import Decoding, GenerationProtocol, get_protocol
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.errors import ConfigurationError, FurinaError
from furina.evaluation.generation import generate
from furina.evaluation.hflm import live_model

Texts = list[str]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--task", default="gsm8k")
    parser.add_argument("--protocol", default="cot", help="a protocol that writes greedily")
    parser.add_argument("--rows", type=int, default=32, help="the first rows of the test split")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=default_device)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def asked(options: argparse.Namespace) -> tuple[Texts, Decoding, str]:
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


def peer(lm: HFLM, prompts: Texts, decoding: Decoding) -> Texts:
    """Return what HFLM writes."""
    rule = {"until": [*decoding.stop], "max_gen_toks": decoding.max_new_tokens, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompt, dict(rule)), index)
        for index, prompt in enumerate(prompts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


def measure(options: argparse.Namespace) -> dict:
    """Return the report: seconds by round, their ratios, and how many answers differ."""
    prompts, decoding, data = asked(options)
    torch.set_num_threads(options.threads)
    model = furina.load_backbone(options.backbone, options.dtype, options.device)
    tokenizer = furina.load_tokenizer(options.backbone)
    rng = random.Random(options.seed)
    seconds: dict[str, list[float]] = {"hflm": [], "ours": []}
    texts: dict[str, Texts] = {}
    with live_model(model, tokenizer, options.batch_size, "lm_eval") as lm:
        runs: dict[str, Callable[[], Texts]] = {
            "hflm": lambda: peer(lm, prompts, decoding),
            "ours": lambda: [
                *generate(model, tokenizer, prompts, decoding, options.batch_size).texts
            ],
        }
        for _ in range(options.rounds):
            for name in rng.sample(list(runs), k=2):
                took, texts[name] = timed(runs[name])
                seconds[name].append(took)
                print(f"{name} {took:.1f} s", flush=True)
    ratios = [a / b for a, b in zip(seconds["hflm"], seconds["ours"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "seconds": seconds,
        "differing": sum(a != b for a, b in zip(texts["hflm"], texts["ours"], strict=True)),
        "settings": vars(options),
        "data": data,
        "versions": {
            module.__name__: module.__version__ for module in (torch, transformers, lm_eval)
        },
    }


def main() -> None:
    options = parse()
    try:
        report = measure(options)
    except FurinaError as error:
        sys.exit(str(error))
    print(f"{report['ratio']:.2f}x, {report['differing']} of {options.rows} answers differ")
    print(json.dumps(report))
    sys.exit(options.dtype == "float32" and report["differing"] > 0)


if __name__ == "__main__":
    main()
