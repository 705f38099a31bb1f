"""MultiArith: word problems of several steps (Roy and Roth, 2015, arXiv:1608.01413).

The public hub cuts the 600 problems in two; here they are one test split, as in the literature.
"""

from __future__ import annotations

from furina.data.cells import Row, cell, number_text, text
from furina.data.items import Problem
from furina.data.rows import instruction_row, worked_problem
from furina.data.tasks.base import Files, Hub, Task


def _public(row: Row) -> Problem:
    return worked_problem(text(row, "question").strip(), number_text(cell(row, "final_ans")))


TASK = Task(
    name="multiarith",
    title="MultiArith",
    kind="math",
    licence="not stated",
    rows={"test": 600},
    hub={"test": Hub("ChilleD/MultiArith", None, "train+test", _public)},
    files={"test": Files("llm_adapters_math/MultiArith_test.json.gz", instruction_row)},
)
