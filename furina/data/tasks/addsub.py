"""AddSub: additions and subtractions in words (Hosseini et al., 2014, EMNLP).

The rows are those that LLM-Adapters tests on; no set of a public hub is known to hold the same.
"""

from __future__ import annotations

from furina.data.rows import instruction_row
from furina.data.tasks.base import Files, Task

TASK = Task(
    name="addsub",
    title="AddSub",
    kind="math",
    licence="not stated",
    rows={"test": 395},
    files={"test": Files("llm_adapters_math/AddSub_test.json.gz", instruction_row)},
)
