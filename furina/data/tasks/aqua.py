"""AQuA: algebra problems with five options (Ling et al., 2017, arXiv:1705.04146).

The options stand in the question, and the answer is a letter.
"""

from __future__ import annotations

from furina.data.items import Problem
from furina.data.parsing import Row, text, texts, worked_problem
from furina.data.places import Files, on_hub
from furina.data.tasks import Task

_LETTERS = "ABCDE"


def _letter(row: Row, name: str) -> str:
    letter = text(row, name).strip()
    if len(letter) != 1 or letter not in _LETTERS:
        raise ValueError(f"answer {letter!r} is none of the letters {_LETTERS}")
    return letter


def _public(row: Row) -> Problem:
    """Read "question" and options such as "A)23.65" as LLM-Adapters joins them."""
    options = "(" + "(".join(texts(row, "options"))
    listed = options.replace("(", " (").replace(")", ") ")
    question = f"{text(row, 'question').strip()} Answer Choices:{listed}"
    return worked_problem(question, _letter(row, "correct"), text(row, "rationale").strip())


def _instruction(row: Row) -> Problem:
    return worked_problem(text(row, "instruction"), _letter(row, "answer"))


TASK = Task(
    name="aqua",
    title="AQuA",
    kind="math",
    licence="Apache-2.0",
    rows={"train": 97467, "validation": 254, "test": 254},
    hub=on_hub("deepmind/aqua_rat", "raw", _public, ("train", "validation", "test")),
    files={"test": Files("llm_adapters_math/AQuA_test.json.gz", _instruction)},
    answer_kind="letter",
)
