"""Protocol `cot`: mathematics by a worked solution, its answer read out in three ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from furina.data import extraction
from furina.data.items import Item, Problem
from furina.data.protocols import Decoding, GenerationProtocol, Judgement
from furina.data.tasks import Task

_Reading = Callable[[str], str | None]


class ChainOfThought(GenerationProtocol):
    """Zero-shot "Question: … Answer:", a solution, then "#### answer" (MATH: inside \\boxed).

    Strict and flexible extraction are lm-eval's for GSM8K; a model that was trained on another
    format scores 0 under `strict`, so both stand side by side, and math-verify's own parser
    cross-checks them.
    """

    name: ClassVar[str] = "cot"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "a worked solution: strict, flexible and math-verify's extraction"
    metrics: ClassVar[tuple[str, ...]] = ("flexible", "strict", "math_verify")
    ends: ClassVar[bool] = True

    def refusal(self, task: Task) -> str | None:
        """Refuse everything but mathematics."""
        return None if task.kind == "math" else "it is not a mathematical task"

    def context(self, task: Task, item: Item) -> str:
        """Return the problem, as lm-eval's gsm8k asks it without examples."""
        assert isinstance(item, Problem)
        return f"Question: {item.question}\nAnswer:"

    def target(self, task: Task, item: Item) -> str:
        """Return the solution, closed by its answer where that does not stand in a box."""
        assert isinstance(item, Problem)
        if task.answer_kind == "latex":
            return f" {item.solution}"
        return f" {item.solution}\n#### {item.answer}" if item.solution else f" #### {item.answer}"

    def decoding(self, task: Task) -> Decoding:
        """Return greedy decoding up to the next question."""
        return Decoding(512, ("Question:",))

    def judge(self, task: Task, item: Item, output: str) -> dict[str, Judgement]:
        """Return the three readings."""
        assert isinstance(item, Problem)
        strict, flexible, equal = _READINGS[task.answer_kind]
        return {
            "flexible": Judgement.of(flexible(output), item.answer, equal),
            "strict": Judgement.of(strict(output), item.answer, equal),
            "math_verify": _verified(task, item.answer, output),
        }


def _boxed_or_number(output: str) -> str | None:
    boxed = extraction.last_boxed(output)
    return boxed if boxed is not None else extraction.last_number(output)


_READINGS: dict[str, tuple[_Reading, _Reading, Callable[[str, str], bool]]] = {
    "number": (extraction.strict_number, extraction.flexible_number, extraction.numbers_equal),
    "letter": (extraction.strict_letter, extraction.anchored_letter, str.__eq__),
    "latex": (extraction.last_boxed, _boxed_or_number, extraction.latex_equal),
}
"""By the kind of answer: how it is read strictly and flexibly, and when two are equal."""


def _verified(task: Task, gold: str, output: str) -> Judgement:
    if task.answer_kind == "letter":  # math-verify reads expressions, not choices
        return Judgement.of(extraction.anchored_letter(output), gold)
    return Judgement(None, bool(extraction.verified(gold, output)))


PROTOCOL = ChainOfThought()
