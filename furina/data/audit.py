"""Count a task's rows, and how much of its test split its train split gives away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from furina.data.items import Item, Question, normalised, overlap
from furina.data.places import Split
from furina.data.sources import Source, load_items, resolve_source, splits_held
from furina.data.tasks import get_task

NGRAM = 13
"""Words in a row that count as contamination if they are shared, as in GPT-3's report."""


@dataclass(frozen=True)
class SplitFacts:
    """What can be counted in one split.

    Attributes:
        rows: rows that the source holds.
        public_rows: rows of the public split.
        labels: how often each letter is the right one; empty for other than questions.
        duplicates: rows whose normalised text an earlier row has.
    """

    rows: int
    public_rows: int
    labels: Mapping[str, int]
    duplicates: int


@dataclass(frozen=True)
class Leakage:
    """How many test items stand in train: by whole normalised text, and by runs of words."""

    test_rows: int
    exact: int
    ngram: int


@dataclass(frozen=True)
class Audit:
    """The facts of each split; `leakage` is None where the source lacks train or test."""

    task: str
    source: Source
    ngram_size: int
    splits: Mapping[Split, SplitFacts]
    leakage: Leakage | None


def audit(task: str, source: Source = "auto", data_dir: Path | str | None = None) -> Audit:
    """Count what `source` holds of a task.

    Raises:
        ConfigurationError: task or source is unknown.
        DataError: the source holds nothing of the task, or its rows are missing or damaged.
        AssetError: the wheel is asked for but not cached.
    """
    found, resolved = get_task(task), resolve_source(source, data_dir)
    held = splits_held(found, resolved) or ["test"]  # which `load_items` then refuses
    items = {split: load_items(task, split, source, data_dir) for split in held}
    facts = {split: split_facts(rows, found.rows[split]) for split, rows in items.items()}
    pair = (items["train"], items["test"]) if {"train", "test"} <= set(items) else None
    return Audit(task, resolved, NGRAM, facts, leakage(*pair) if pair else None)


def split_facts(items: Sequence[Item], public_rows: int) -> SplitFacts:
    """Count rows, right letters and repeats."""
    letters = Counter(i.letters[i.answer] for i in items if isinstance(i, Question))
    distinct = len({normalised(item) for item in items})
    return SplitFacts(len(items), public_rows, dict(sorted(letters.items())), len(items) - distinct)


def leakage(train: Sequence[Item], test: Sequence[Item], ngram: int = NGRAM) -> Leakage:
    """Count the test items that stand in train, whole or with one of their runs of words."""
    known = {gram for item in train for gram in ngrams(item, ngram)}
    shared = sum(any(gram in known for gram in ngrams(item, ngram)) for item in test)
    return Leakage(len(test), len(overlap(test, train)), shared)


def ngrams(item: Item, size: int) -> Iterable[str]:
    """Yield every run of `size` words of the normalised text; all of it where it is shorter."""
    words = normalised(item).split()
    return (" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))
