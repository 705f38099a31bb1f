"""Data and tokenizers that can be read now, without a network; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from furina.assets import ASSETS, is_cached
from furina.assets.hub import cached_file
from furina.backbones.load import load_tokenizer
from furina.backbones.tiny import TINY
from furina.data.items import Item
from furina.data.places import Split
from furina.data.sources import Source, load_items, splits_at_hand
from furina.data.tasks import get_task
from furina.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

SAMPLE = 256
"""Items of a split that are tokenised."""
FALLBACK = "smollm2-135m-instruct"
"""Whose tokenizer counts where the backbone's is not at hand."""


@cache
def items_at_hand(
    task: str, split: Split, source: Source, data_dir: str | None
) -> tuple[Item, ...] | None:
    """Return a split's items, None where they cannot be read."""
    try:
        if split not in splits_at_hand(get_task(task), source, data_dir):
            return None
        return tuple(load_items(task, split, source, data_dir))
    except DataError:
        return None


def number_of_items(task: str, split: Split, source: Source, data_dir: str | None) -> int:
    """Return the size of a split: of the user's own folder, else by the public counts."""
    own = items_at_hand(task, split, source, data_dir) if data_dir else None
    return len(own) if own else get_task(task).rows.get(split, 0)


def spaced(items: Sequence[T]) -> Sequence[T]:
    """Return a sample, evenly spaced."""
    return items[:: max(1, len(items) // SAMPLE)][:SAMPLE]


def counting(backbone: str) -> str | None:
    """Return whose tokenizer counts a backbone's tokens: its own, or one that stands in for it."""
    return next((name for name in (backbone, FALLBACK) if _place(name)), None)


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `counting` named."""
    return load_tokenizer(_place(name) or name)


@cache
def _place(name: str) -> str | None:
    """Return what `load_tokenizer` reads for a backbone without asking the hub."""
    if name in TINY or (name in ASSETS and is_cached(name)):
        return name
    folder = Path(name).expanduser()
    if not folder.is_dir():
        cached = cached_file(name, "tokenizer_config.json")
        folder = cached.parent if cached else folder
    whole = all((folder / file).is_file() for file in ("config.json", "tokenizer_config.json"))
    return str(folder) if whole else None
