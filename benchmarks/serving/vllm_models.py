"""What vllm_engine.py asks about: an adapter that matters, its exports, and our own answers."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import furina
from benchmarks.common.models import put_in, relative_update
from benchmarks.merging import measures
from benchmarks.serving.vllm_checks import Reference, refer
from furina.data.protocols import get_protocol
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.errors import AssetError, DataError
from furina.evaluation.latency import generate

RANDOM = "random"
"""The task that is none: random tokens."""
NEAR = 1e-3
"""How far, relatively, a linear's update may be from the size asked for."""
EXACT = {"bfloat16": "float32", "float16": "float32", "float32": "float64"}
"""The dtype that the measured rounding of each is held against."""

Tokens = list[int]


class Exports(NamedTuple):
    """Folders that were written, the LoRA's rank, and ‖ΔW‖/‖W‖ over all adapted linears."""

    base: Path
    merged: Path
    lora: Path
    adapter: Path
    rank: int
    relative_update: float


def export(folder: Path, options: Namespace) -> Exports:
    """Write the backbone, the merged model, the LoRA and furina's own adapter into `folder`.

    Raises FurinaError if the backbone or the adapter does not load, or cannot be merged.
    """
    base, merged, lora, adapter = (folder / n for n in ("base", "merged", "lora", "adapter"))
    model = furina.load_backbone(options.backbone, options.dtype)
    model.save_pretrained(base)
    put_in(model, "furina", options.relative_update, options, NEAR)
    relative = relative_update(model)
    furina.export_merged(model, merged)
    furina.save(model, adapter)
    return Exports(base, merged, lora, adapter, furina.export_peft(model, lora), relative)


def prompts(rows: int, tokens: int, options: Namespace) -> tuple[list[Tokens], str]:
    """Return `rows` prompts of so many tokens, and where they are from.

    They are consecutive test questions of `options.task` with their answers, or random tokens
    where its data are not at hand.
    """
    tokenizer = furina.load_tokenizer(options.backbone)
    texts: list[str] = []
    if options.task != RANDOM:
        try:
            task, protocol = get_task(options.task), get_protocol("text")
            texts = [
                protocol.context(task, item) + protocol.target(task, item)
                for item in load_items(options.task, "test")
            ]
        except (DataError, AssetError) as error:
            print(f"random tokens are asked about: {error}", flush=True)
    if not texts:
        generator = torch.Generator().manual_seed(options.seed)
        drawn = torch.randint(len(tokenizer), (rows, tokens), generator=generator)
        return drawn.tolist(), "random tokens"

    def encode(text: str) -> Tokens:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = itertools.islice(cut(texts, encode, tokens), rows)
    return list(found), f"test questions of {options.task}"


def cut(texts: Iterable[str], encode: Callable[[str], Tokens], tokens: int) -> Iterator[Tokens]:
    """Yield rows of so many tokens without end; each starts with a text of its own."""
    endless = itertools.cycle(texts)
    while True:
        row: Tokens = []
        while len(row) < tokens:
            row += encode(next(endless) + "\n\n")
        yield row[:tokens]


def load(variant: str, exports: Exports, dtype: str, device: str) -> Any:
    """Return our own model of a variant: a folder, or the backbone with the adapter beside it."""
    folder = exports.merged if variant == "merged" else exports.base
    model: Any = furina.load_backbone(str(folder), dtype, device)
    if variant == "adapter":
        furina.load(exports.adapter, model)
    return model.requires_grad_(False).eval()


@torch.inference_mode()
def reference(variant: str, exports: Exports, rows: list[Tokens], options: Namespace) -> Reference:
    """Return what our model says of every token but the first, exactly and in `options.dtype`."""
    exact = load(variant, exports, EXACT[options.dtype], options.device)
    rounded = load(variant, exports, options.dtype, options.device)

    def logits(model: Any, row: Tokens) -> Tensor:
        return measures.logits(model, [row], 1)[:-1].to("cpu", torch.float64)

    found = [refer(logits(exact, row), logits(rounded, row), torch.tensor(row[1:])) for row in rows]
    return Reference(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@torch.inference_mode()
def continuations(
    variant: str, exports: Exports, rows: list[Tokens], options: Namespace
) -> list[Tokens]:
    """Return what transformers generates greedily after each row, all rows in one batch."""
    model = load(variant, exports, options.dtype, options.device)
    batch = torch.tensor(rows, device=model.device)
    return generate(model, batch, options.new_tokens)[0].tolist()
