"""Time base, unmerged and merged generation of one model; the last line printed is JSON.

    python benchmarks/latency.py --backbone smollm2-135m-instruct --method furina

The adapter is a new one, since time does not depend on its values.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch

import furina
from furina.latency import LatencyResult, measure_latency


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="tiny-llama", help="asset, folder or hub name")
    parser.add_argument("--method", default="furina", help="see `furina methods`")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt-tokens", type=int, default=100)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def line(result: LatencyResult) -> str:
    total, ratio = result.total_ms, result.ratio_to_base["total_ms"]
    return (
        f"{result.variant:<10} first token {result.ttft_ms.median:8.1f} ms   per token "
        f"{result.per_token_ms.median:7.2f} ms   total {total.median:8.1f} ms "
        f"[{total.q1:.1f}, {total.q3:.1f}]   {ratio.median:.2f}x base"
    )


def main() -> None:
    options = parse()
    model = furina.load_backbone(options.backbone, dtype=options.dtype, device=options.device)
    furina.adapt(model, options.method, seed=options.seed)
    results = measure_latency(
        model,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        rounds=options.rounds,
        warmup=options.warmup,
        seed=options.seed,
    )
    print(*map(line, results), sep="\n")
    settings = {**vars(options), "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"settings": settings, "latency": [asdict(result) for result in results]}))


if __name__ == "__main__":
    main()
