"""Tasks, protocols and batches: the rows of the benchmarks, and how they are asked."""

from furina.data.batches import Batch, Example, StepBatches, collate, encode_examples
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
from furina.data.module import TaskDataModule
from furina.data.protocols import Protocol, get_protocol, protocols
from furina.data.sources import Source, Split, load_items, resolve_source
from furina.data.splits import split_train, test_subset, warn_overlap
from furina.data.tasks import Task, get_task, tasks

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
