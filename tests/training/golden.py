"""Losses of 20 optimiser steps of every method, recorded before anything was optimised.

    python -m tests.training.golden    # writes golden_losses.json anew: only if results may change

Each step has two micro-batches with padding; the method's auxiliary loss is on and every switch of
the method is off its default once. Float64 runs have dropout, too: the masks are part of a run.
The code is that of the commit in the file, but for tiny weights drawn in float64: fp32 normal
numbers differ by a millionth from processor to processor.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.optim import AdamW

import furina
from furina.adapters import AdapterConfig, methods
from furina.backbones.load import load_backbone
from furina.data.batches import collate
from furina.storage import write_json
from furina.training.loss import answer_loss, select_answers
from tests.helpers import small, variants
from tests.training.helpers import examples

FILE = Path(__file__).with_name("golden_losses.json")
STEPS, ROWS = 20, 6
ACTIVE = {
    "loramoe": {"balance_coefficient": 0.1, "task_type": 1},
    "mola": {"allocation": (2, 3)},
}


def configs() -> Iterator[tuple[str, AdapterConfig]]:
    """Yield every method with at most one switch off its default, and with dropout."""
    for method in methods():
        options = ACTIVE.get(method, {})
        for config in variants(method, together=1):
            changed = {**config.to_dict(), **options}
            if changed.get("router_removed"):
                changed.pop("balance_coefficient", None)
            if changed.get("start") == "zero_b":
                changed["eps"] = 0.1  # its 1/ε of a gradient makes any rounding chaos in 20 steps
            config = furina.adapters.configure(method, changed)
            yield name_of(config), config
        config = small(method, dropout=0.1, **options)
        yield name_of(config), config


def default(method: str) -> AdapterConfig:
    """Return the method's small default, with its auxiliary loss on."""
    return small(method, **ACTIVE.get(method, {}))


def name_of(config: AdapterConfig) -> str:
    """Name a config by what differs from the small default."""
    plain = small(config.name).to_dict()
    changed = {k: v for k, v in config.to_dict().items() if v != plain[k]}
    return " ".join([config.name, *(f"{k}={v}" for k, v in sorted(changed.items()))])


def losses(config: AdapterConfig, dtype: str, steps: int = STEPS) -> list[float]:
    """Return the loss of each step."""
    model = furina.adapt(backbone(dtype), config, seed=1).train()
    optimizer = AdamW(furina.parameter_groups(model, 1e-3, weight_decay=0.01))
    rows, found = examples(), []
    for step in range(steps):
        torch.manual_seed(step)
        window = [[rows[(step * 2 * ROWS + half * ROWS + i) % len(rows)] for i in range(ROWS)]
                  for half in range(2)]  # fmt: skip
        optimizer.zero_grad()
        total = 0.0
        for micro in window:
            batch = select_answers(collate(micro, pad_id=0))
            loss = (answer_loss(model, batch)[0] + furina.auxiliary_loss(model)) / 2
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(list(furina.adapter_parameters(model).values()), 1.0)
        optimizer.step()
        furina.after_step(model)
        found.append(total)
    return found


def backbone(dtype: str) -> nn.Module:
    """Return the tiny Llama with norms in its own dtype: Llama's round to fp32 even in float64."""
    model = load_backbone("tiny-llama", dtype)
    for name, module in list(model.named_modules()):
        if name.endswith("norm"):
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=model.dtype)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def main() -> None:
    torch.set_num_threads(1)
    ask = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(ask, capture_output=True, text=True, check=True)
    runs = {
        name: {dtype: losses(config, dtype) for dtype in ("float64", "float32")}
        for name, config in configs()
    }
    write_json(FILE, {"commit": commit.stdout.strip(), "torch": torch.__version__, "losses": runs})
    print(len(runs), "runs written to", FILE)


def recorded() -> dict[str, dict[str, list[float]]]:
    """Return the recorded losses by config and dtype."""
    losses: dict[str, dict[str, list[float]]] = json.loads(FILE.read_text())["losses"]
    return losses


if __name__ == "__main__":
    main()
