"""Seeded splits and subsets that do not depend on row order or on a library's generator."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence

from furina.data.items import Item, ItemT, normalised, overlap
from furina.errors import ConfigurationError


def seeded_key(seed: int, key: str) -> bytes:
    """Return a pseudo-random sort key: the same for one seed and key on every machine."""
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()


def chosen(keys: Sequence[str], count: int, seed: int) -> list[int]:
    """Return the indices, in order, of `count` keys that the seed chooses."""
    return sorted(sorted(range(len(keys)), key=lambda i: seeded_key(seed, keys[i]))[:count])


def split_train(
    items: Sequence[ItemT], validation_size: int, seed: int
) -> tuple[list[ItemT], list[ItemT]]:
    """Split off `validation_size` items as (train, held out), both in the given order.

    Items with the same normalised text stay on one side, so none is held out and seen.

    Raises:
        ConfigurationError: nothing would be left to train on, or the size cannot be met.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[normalised(item)].append(index)
    held_out: set[int] = set()
    for key in sorted(groups, key=lambda key: seeded_key(seed, key)):
        if len(held_out) + len(groups[key]) <= validation_size:
            held_out.update(groups[key])
    if len(held_out) != validation_size or validation_size >= len(items):
        raise ConfigurationError(
            f"validation_size={validation_size} cannot be split off {len(items)} train "
            "items: choose a smaller one, 0 for none."
        )
    train = [item for index, item in enumerate(items) if index not in held_out]
    return train, [items[index] for index in sorted(held_out)]


def test_subset(
    items: Sequence[ItemT], size: int | None, seed: int, name: str = "subset"
) -> tuple[str, list[ItemT]]:
    """Return (name, items): a fixed subset in the given order, or ("full", all) for no size.

    A subset depends on seed and item ids alone, and a smaller one lies inside a larger one.

    Raises:
        ConfigurationError: `size` is not between 1 and the number of items.
    """
    if size is None:
        return "full", list(items)
    if not 1 <= size <= len(items):
        raise ConfigurationError(
            f"test_size={size} is not possible with {len(items)} test items: choose 1 to "
            f"{len(items)}, or none for all."
        )
    indices = chosen([item.id for item in items], size, seed)
    return f"{name}-{size}-seed{seed}", [items[index] for index in indices]


def warn_overlap(train: Sequence[Item], test: Sequence[Item], task: str) -> None:
    """Warn when train items also stand in the test items; none is removed."""
    if shared := overlap(train, test):
        warnings.warn(
            f"{len(shared)} of {len(train)} train items of {task} have the same text as one "
            f"of the {len(test)} test items; they are kept, as in the public splits.",
            stacklevel=2,
        )
