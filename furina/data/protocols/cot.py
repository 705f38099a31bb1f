"""Protocol `cot`: mathematics by a worked solution, its answer read out in three ways."""

from __future__ import annotations

from typing import ClassVar

from furina.data import extraction
from furina.data.items import Item, Problem
from furina.data.protocols.base import Decoding, GenerationProtocol, Judgement
from furina.data.tasks.base import Task


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
        strict, flexible = _RULES[task.answer_kind](output)
        return {
            "flexible": _judged(task, flexible, item.answer),
            "strict": _judged(task, strict, item.answer),
            "math_verify": _verified(task, item.answer, output),
        }


def _number(output: str) -> tuple[str | None, str | None]:
    return extraction.strict_number(output), extraction.flexible_number(output)


def _letter(output: str) -> tuple[str | None, str | None]:
    return extraction.strict_letter(output), extraction.anchored_letter(output)


def _latex(output: str) -> tuple[str | None, str | None]:
    boxed = extraction.last_boxed(output)
    return boxed, boxed if boxed is not None else extraction.last_number(output)


_RULES = {"number": _number, "letter": _letter, "latex": _latex}


def _judged(task: Task, answer: str | None, gold: str) -> Judgement:
    if answer is None:
        return Judgement(None, False)
    if task.answer_kind == "number":
        return Judgement(answer, extraction.numbers_equal(answer, gold))
    equal = extraction.latex_equal if task.answer_kind == "latex" else str.__eq__
    return Judgement(answer, equal(answer, gold))


def _verified(task: Task, gold: str, output: str) -> Judgement:
    if task.answer_kind == "letter":  # math-verify reads expressions, not choices
        letter = extraction.anchored_letter(output)
        return Judgement(letter, letter == gold)
    return Judgement(None, bool(extraction.verified(gold, output)))


PROTOCOL = ChainOfThought()
