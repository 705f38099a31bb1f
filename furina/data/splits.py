"""Seeded splits and subsets that do not depend on row order or on a library's generator."""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Sequence

from furina.data.questions import Question, overlap
from furina.errors import ConfigurationError


def _rank(seed: int, key: str) -> bytes:
    """Return a pseudo-random sort key: the same for one seed and key on every machine."""
    return hashlib.sha256(f"{seed}\n{key}".encode()).digest()


def split_train(
    questions: Sequence[Question], validation_size: int, seed: int
) -> tuple[list[Question], list[Question]]:
    """Split off `validation_size` questions as (train, held out), both in the given order.

    Questions with the same normalised stem stay on one side, so none is held out and seen.

    Raises:
        ConfigurationError: nothing would be left to train on, or the size cannot be met.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[question.normalised].append(index)
    held_out: set[int] = set()
    for key in sorted(groups, key=lambda key: _rank(seed, key)):
        if len(held_out) + len(groups[key]) <= validation_size:
            held_out.update(groups[key])
    if len(held_out) != validation_size or validation_size >= len(questions):
        raise ConfigurationError(
            f"validation_size={validation_size} cannot be split off {len(questions)} train "
            "questions: choose a smaller one, 0 for none."
        )
    train = [question for index, question in enumerate(questions) if index not in held_out]
    return train, [questions[index] for index in sorted(held_out)]


def test_subset(
    questions: Sequence[Question], size: int | None, seed: int, name: str = "subset"
) -> tuple[str, list[Question]]:
    """Return (name, questions): a fixed subset in the given order, or ("full", all) for no size.

    A subset depends on seed and question ids alone, and a smaller one lies inside a larger one.

    Raises:
        ConfigurationError: `size` is not between 1 and the number of questions.
    """
    if size is None:
        return "full", list(questions)
    if not 1 <= size <= len(questions):
        raise ConfigurationError(
            f"test_size={size} is not possible with {len(questions)} test questions: choose 1 to "
            f"{len(questions)}, or none for all."
        )
    ranked = sorted(range(len(questions)), key=lambda index: _rank(seed, questions[index].id))
    return f"{name}-{size}-seed{seed}", [questions[index] for index in sorted(ranked[:size])]


def warn_overlap(train: Sequence[Question], test: Sequence[Question], task: str) -> None:
    """Warn when train questions also stand in the test questions; none is removed."""
    if shared := overlap(train, test):
        warnings.warn(
            f"{len(shared)} of {len(train)} train questions of {task} have the same text as one "
            f"of the {len(test)} test questions; they are kept, as in the public splits.",
            stacklevel=2,
        )
