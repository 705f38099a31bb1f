"""Protocol `code`: a function is written to its docstring and run against its tests (pass@1)."""

from __future__ import annotations

from typing import ClassVar

from furina.data.items import Instruction, Item, Program
from furina.data.protocols import Decoding, GenerationProtocol, Judgement
from furina.data.tasks import Task
from furina.errors import ConfigurationError

REQUEST = "Complete the following Python function."


class Code(GenerationProtocol):
    """HumanEval, asked as CodeAlpaca asks: an instruction, an input, a response.

    Judging executes what the model wrote: it needs an explicit flag and happens in a process of
    its own (furina.evaluation.sandbox).
    """

    name: ClassVar[str] = "code"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "a program run against its tests: pass@1, only with --execute-code"
    metrics: ClassVar[tuple[str, ...]] = ("pass@1",)
    ends: ClassVar[bool] = True
    runs_code: ClassVar[bool] = True

    def refusal(self, task: Task) -> str | None:
        """Refuse everything but programs."""
        return None if task.kind == "code" else "it asks for no program"

    def context(self, task: Task, item: Item) -> str:
        """Return the instruction and its input."""
        if isinstance(item, Program):
            return _prompt(REQUEST, item.prompt.rstrip())
        assert isinstance(item, Instruction)
        return _prompt(item.instruction, item.input)

    def target(self, task: Task, item: Item) -> str:
        """Return the response, on a line of its own."""
        if isinstance(item, Program):
            return f"\n{item.prompt}{item.solution}"
        assert isinstance(item, Instruction)
        return f"\n{item.output}"

    def decoding(self, task: Task) -> Decoding:
        """Return greedy decoding up to the next section."""
        return Decoding(512, ("\n### ",))

    def judge(self, task: Task, item: Item, output: str) -> dict[str, Judgement]:
        """Refuse: only running the program tells."""
        raise ConfigurationError("A program is judged by running it: see furina.evaluation.")


def _prompt(instruction: str, given: str) -> str:
    sections = [f"### Instruction:\n{instruction}"]
    sections += [f"### Input:\n{given}"] if given else []
    return "\n\n".join([*sections, "### Response:"])


PROTOCOL = Code()
