"""SVAMP: word problems with small, confusing changes (Patel et al., 2021, arXiv:2103.07191).

The public hub cuts the 1,000 problems in two; here they are one test split, as in the literature.
"""

from __future__ import annotations

from furina.data.cells import Row, cell, number_text, text
from furina.data.items import Problem
from furina.data.rows import instruction_row, worked_problem
from furina.data.tasks.base import Files, Hub, Task


def _public(row: Row) -> Problem:
    """Join body and question as one text, the body ending in a full stop."""
    body, question = text(row, "Body").strip(), text(row, "Question").strip()
    joined = f"{body} {question}" if body.endswith((".", "?", "!")) else f"{body}. {question}"
    return worked_problem(joined, number_text(cell(row, "Answer")))


TASK = Task(
    name="svamp",
    title="SVAMP",
    kind="math",
    licence="MIT",
    rows={"test": 1000},
    hub={"test": Hub("ChilleD/SVAMP", None, "train+test", _public)},
    files={"test": Files("llm_adapters_math/SVAMP_test.json.gz", instruction_row)},
)
