"""Tasks, protocols and batches: the rows of the benchmarks, and how they are asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from furina.data.encoding import encode_pair
from furina.data.items import (
    Instruction,
    Item,
    Problem,
    Program,
    Question,
    chance_level,
    data_hash,
    overlap,
)
from furina.data.mixtures import Share
from furina.data.protocols import Protocol, get_protocol, protocols
from furina.data.sources import Source, Split, load_items, resolve_source
from furina.data.splits import split_train, test_subset, warn_overlap
from furina.data.tasks import Task, get_task, tasks

if TYPE_CHECKING:
    from furina.data.batches import Batch, Example, StepBatches, collate, encode_examples
    from furina.data.module import TaskDataModule

__all__ = [
    "Batch",
    "Example",
    "Instruction",
    "Item",
    "Problem",
    "Program",
    "Protocol",
    "Question",
    "Share",
    "Source",
    "Split",
    "StepBatches",
    "Task",
    "TaskDataModule",
    "chance_level",
    "collate",
    "data_hash",
    "encode_examples",
    "encode_pair",
    "get_protocol",
    "get_task",
    "load_items",
    "overlap",
    "protocols",
    "resolve_source",
    "split_train",
    "tasks",
    "test_subset",
    "warn_overlap",
]

_LATE = {
    **dict.fromkeys(("Batch", "Example", "StepBatches", "collate", "encode_examples"), "batches"),
    "TaskDataModule": "module",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch where it is first used: a wrong name is told without it."""
    if name not in _LATE:
        raise AttributeError(f"module 'furina.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"furina.data.{_LATE[name]}"), name)
