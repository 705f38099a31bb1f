"""Protocol `lm_eval`: the harness's own task, untouched; evaluation only."""

from __future__ import annotations

from typing import ClassVar

from furina.data.items import Item
from furina.data.protocols import Protocol
from furina.data.tasks import Task
from furina.errors import ConfigurationError


class LmEval(Protocol):
    """lm-eval's prompts, scoring and metrics; only the rows are handed over.

    The version of a score is the harness's version of the task.
    """

    name: ClassVar[str] = "lm_eval"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "lm-eval's own task, untouched: its prompts, scoring and metrics"
    metrics: ClassVar[tuple[str, ...]] = ("acc",)
    trains: ClassVar[bool] = False

    def refusal(self, task: Task) -> str | None:
        """Refuse tasks whose rows cannot be handed to the harness."""
        if task.harness and task.harness_row:
            return None
        return "its rows cannot be handed to the harness; furina.evaluation.builtin takes lm-eval's"

    def context(self, task: Task, item: Item) -> str:
        """Refuse: the harness makes its prompts itself."""
        raise ConfigurationError(
            "Protocol lm_eval only evaluates, with prompts that lm-eval makes: train under another."
        )

    target = context


PROTOCOL = LmEval()
