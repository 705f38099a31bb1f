"""Protocols `generate_v1` and `generate_clean`: free generation in LLM-Adapters' format.

`v1` repeats LLM-Adapters as published (its `finetune.py`, `evaluate.py` and
`commonsense_evaluate.py`), quirks included: training and evaluation prompts that differ in white
space, loss on the prompt, padding that is attended to, beam search, and the first label word
anywhere in the output. `clean` mends these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from furina.data import extraction
from furina.data.items import Item, Problem, Question
from furina.data.protocols import Decoding, GenerationProtocol, Judgement, Pair
from furina.data.tasks import Task

INTRODUCTION = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
RESPONSE = "### Response:"
_INDENT = " " * 16
"""LLM-Adapters' prompts are indented string literals: the indentation is part of the prompt."""

NEW_TOKENS = {"choice": 32, "math": 256}
BEAMS = 4


class Generate(GenerationProtocol):
    """What both versions share: the instruction, the answer's sentence, one metric.

    `word` reads which of a task's answer words an output gives, `letter` which of AQuA's letters.
    """

    metrics: ClassVar[tuple[str, ...]] = ("acc",)
    ends: ClassVar[bool] = True
    word: staticmethod[[str, Sequence[str]], str | None]
    letter: staticmethod[[str], str | None]

    def refusal(self, task: Task) -> str | None:
        """Refuse tasks that LLM-Adapters does not ask."""
        if task.instructed or (task.kind == "math" and task.answer_kind != "latex"):
            return None
        return "LLM-Adapters has no instruction and no answer words for it"

    def instruction(self, task: Task, item: Item) -> str:
        """Return LLM-Adapters' `instruction` field."""
        if isinstance(item, Problem):
            return item.question
        assert task.instructed and isinstance(item, Question)
        return task.instructed.instruction(item)

    def output(self, task: Task, item: Item) -> str:
        """Return the sentence that is trained; for problems, the solution and its answer."""
        if isinstance(item, Problem):
            return f"{item.solution}\nThe answer is {item.answer}.".lstrip()
        return f"the correct answer is {self.gold(task, item)}"

    def gold(self, task: Task, item: Item) -> str:
        """Return what must be extracted for the output to be right."""
        if isinstance(item, Problem):
            return item.answer
        assert task.instructed and isinstance(item, Question)
        return task.instructed.answer(item)

    def judge(self, task: Task, item: Item, output: str) -> dict[str, Judgement]:
        """Read out a word, a letter, or the last number, whichever answers the task."""
        if task.kind == "choice":
            assert task.instructed
            answer = self.word(output, task.instructed.words)
        elif task.answer_kind == "letter":
            answer = self.letter(output)
        else:
            answer = extraction.last_number(output)
            return {"acc": Judgement.of(answer, self.gold(task, item), extraction.numbers_equal)}
        return {"acc": Judgement.of(answer, self.gold(task, item))}


class GenerateV1(Generate):
    """LLM-Adapters byte for byte; only right truncation at 256 tokens is not repeated."""

    name: ClassVar[str] = "generate_v1"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "LLM-Adapters' generation as published, its quirks included"
    loss_on_prompt: ClassVar[bool] = True
    word = staticmethod(extraction.first_word)
    letter = staticmethod(extraction.first_letter)

    def context(self, task: Task, item: Item) -> str:
        """Return the evaluation prompt: it ends in an indented empty line."""
        return (
            f"{INTRODUCTION} \n\n{_INDENT}### Instruction:\n{_INDENT}"
            f"{self.instruction(task, item)}\n\n{_INDENT}{RESPONSE}\n{_INDENT}"
        )

    def target(self, task: Task, item: Item) -> str:
        """Return the output's sentence."""
        return self.output(task, item)

    def pair(self, task: Task, item: Item) -> Pair:
        """Return the training prompt, which has other white space than the evaluation's."""
        context = (
            f"{INTRODUCTION}  \n\n{_INDENT}### Instruction:\n{_INDENT}"
            f"{self.instruction(task, item)}\n{_INDENT}\n{_INDENT}{RESPONSE}\n{_INDENT}"
        )
        return Pair(context, self.target(task, item))

    def decoding(self, task: Task) -> Decoding:
        """Return beam search that attends to padding of id 0."""
        return Decoding(NEW_TOKENS[task.kind], (RESPONSE,), BEAMS, pass_mask=False, pad_id=0)


class GenerateClean(Generate):
    """The same instructions with one prompt, masked padding and an anchored extraction."""

    name: ClassVar[str] = "generate_clean"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "LLM-Adapters' generation, mended: mask passed, greedy, anchored"
    word = staticmethod(extraction.anchored_word)
    letter = staticmethod(extraction.anchored_letter)

    def context(self, task: Task, item: Item) -> str:
        """Return the prompt of training and evaluation."""
        return f"{INTRODUCTION}\n\n### Instruction:\n{self.instruction(task, item)}\n\n{RESPONSE}"

    def target(self, task: Task, item: Item) -> str:
        """Return the output's sentence after a space."""
        return f" {self.output(task, item)}"

    def decoding(self, task: Task) -> Decoding:
        """Return greedy decoding up to the next section."""
        return Decoding(NEW_TOKENS[task.kind], ("\n### ",))


V1 = GenerateV1()
CLEAN = GenerateClean()
