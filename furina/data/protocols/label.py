"""Protocol `label`: the next token among option labels, as MoE-PEFT trains and evaluates.

The prompts are those of moe-peft 2.0.2, byte for byte; the paper says that its settings follow
MixLoRA, whose code this is. An off-format answer cannot be wrong here, so scores are systematically
higher than those of the `generate` protocols.
"""

from __future__ import annotations

from typing import ClassVar

from furina.data.items import Item, Question
from furina.data.protocols import ChoiceProtocol
from furina.data.tasks import Labels, Task
from furina.errors import DataError


class Label(ChoiceProtocol):
    """The log-likelihood of each label after a prompt that lists the choices.

    Compared is " " + label whole; MoE-PEFT compares the last token of it, which is the same where
    the label is one token and a defect where it is not (Llama-2's digits).
    """

    name: ClassVar[str] = "label"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "next token among the options' labels (MoE-PEFT, the paper's settings)"
    metrics: ClassVar[tuple[str, ...]] = ("acc",)

    def refusal(self, task: Task) -> str | None:
        """Refuse tasks without labelled options."""
        return None if task.label else "it has no labelled options"

    def context(self, task: Task, item: Item) -> str:
        """Return the question with its labelled choices."""
        assert isinstance(item, Question)
        return _labels(task).context(item)

    def target(self, task: Task, item: Item) -> str:
        """Return the right label; no end-of-text token follows."""
        assert isinstance(item, Question)
        return f" {_labels(task).label(item)}"

    def answers(self, task: Task, question: Question) -> tuple[str, ...]:
        """Return all labels of the task, also those that this question does not offer."""
        return tuple(f" {label}" for label in _labels(task).labels)

    def right(self, task: Task, question: Question) -> int:
        """Return the place of the right label among all."""
        labels = _labels(task)
        if (label := labels.label(question)) not in labels.labels:
            raise DataError(
                f"The answer of question {question.id!r} has label {label}, and protocol label "
                f"compares {', '.join(labels.labels)} on {task.name}: leave the question out."
            )
        return labels.labels.index(label)


def _labels(task: Task) -> Labels:
    assert task.label
    return task.label


PROTOCOL = Label()
