"""OpenBookQA: elementary science facts applied (Mihaylov et al., 2018, arXiv:1809.02789)."""

from __future__ import annotations

from functools import partial

from furina.data.rows import labelled_row, olmes_row
from furina.data.tasks.base import Task

TASK = Task(
    name="openbookqa",
    title="OpenBookQA",
    licence="not stated",
    hub=("allenai/openbookqa", "main"),
    wheel="openbookqa",
    folder="openbookqa",
    parse=partial(labelled_row, stem_field="question_stem"),
    parse_wheel=olmes_row,
)
