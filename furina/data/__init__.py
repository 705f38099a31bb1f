"""Questions, prompts and batches of the multiple-choice benchmarks."""

from furina.data.batches import Batch, Example, StepBatches, collate, encode_examples
from furina.data.module import ChoiceDataModule
from furina.data.prompts import VERSION, Prompt, PromptForm, encode_pair
from furina.data.questions import Question, chance_level, data_hash, overlap
from furina.data.sources import Source, Split, load_questions, resolve_source
from furina.data.splits import split_train, test_subset, warn_overlap
from furina.data.tasks import Task, get_task

__all__ = [
    "VERSION",
    "Batch",
    "ChoiceDataModule",
    "Example",
    "Prompt",
    "PromptForm",
    "Question",
    "Source",
    "Split",
    "StepBatches",
    "Task",
    "chance_level",
    "collate",
    "data_hash",
    "encode_examples",
    "encode_pair",
    "get_task",
    "load_questions",
    "overlap",
    "resolve_source",
    "split_train",
    "test_subset",
    "warn_overlap",
]
