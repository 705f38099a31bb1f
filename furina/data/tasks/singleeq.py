"""SingleEq: word problems of one equation (Koncel-Kedziorski et al., 2015, TACL).

The rows are those that LLM-Adapters tests on; no set of a public hub is known to hold the same.
"""

from __future__ import annotations

from furina.data.rows import instruction_row
from furina.data.tasks.base import Files, Task

TASK = Task(
    name="singleeq",
    title="SingleEq",
    kind="math",
    licence="not stated",
    rows={"test": 508},
    files={"test": Files("llm_adapters_math/SingleEq_test.json.gz", instruction_row)},
)
