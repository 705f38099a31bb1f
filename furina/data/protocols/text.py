"""Protocol `text`: the answer's own text, plain and length-normalised; works for small models."""

from __future__ import annotations

from typing import ClassVar

from furina.data.items import Item, Question
from furina.data.protocols import ChoiceProtocol
from furina.data.tasks import Task, TextPrompt


class Text(ChoiceProtocol):
    """The log-likelihood of each choice's text after the question.

    The shape of lm-eval's own ARC task ("Question: … Answer:"), for every task. Version 1.
    """

    name: ClassVar[str] = "text"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "log-likelihood of each answer's text, plain and per character"
    metrics: ClassVar[tuple[str, ...]] = ("acc", "acc_norm")

    def refusal(self, task: Task) -> str | None:
        """Refuse tasks without choices."""
        return None if task.text else "it has no choices whose text could be compared"

    def context(self, task: Task, item: Item) -> str:
        """Return the question; it never ends in a space."""
        return _prompt(task, item).context

    def target(self, task: Task, item: Item) -> str:
        """Return the right answer's text."""
        assert isinstance(item, Question)
        return self.answers(task, item)[item.answer]

    def answers(self, task: Task, question: Question) -> tuple[str, ...]:
        """Return every choice's text."""
        return _prompt(task, question).answers

    def right(self, task: Task, question: Question) -> int:
        """Return the right choice."""
        return question.answer


def _prompt(task: Task, item: Item) -> TextPrompt:
    assert task.text and isinstance(item, Question)
    return task.text(item)


PROTOCOL = Text()
