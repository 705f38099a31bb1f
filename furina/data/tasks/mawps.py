"""MAWPS: a collection of word problems (Koncel-Kedziorski et al., 2016, NAACL).

The splits are LLM-Adapters'; no set of a public hub is known to hold the same. A train solution is
the problem's equation. Most problems of AddSub and many of MultiArith stand in the train split, so
a model trained on it is not to be tested on those.
"""

from __future__ import annotations

from furina.data.cells import Row, cell, number_text, text
from furina.data.items import Problem
from furina.data.rows import instruction_row, worked_problem
from furina.data.tasks.base import Files, Task


def _equation(row: Row) -> Problem:
    answer = number_text(cell(row, "ans"))
    return worked_problem(text(row, "original_text"), answer, text(row, "equation"))


TASK = Task(
    name="mawps",
    title="MAWPS",
    kind="math",
    licence="not stated",
    rows={"train": 1898, "validation": 237, "test": 238},
    files={
        "train": Files("llm_adapters_math/mawps_trainset.json.gz", _equation),
        "validation": Files("llm_adapters_math/mawps_validset.json.gz", _equation),
        "test": Files("llm_adapters_math/mawps_test.json.gz", instruction_row),
    },
)
