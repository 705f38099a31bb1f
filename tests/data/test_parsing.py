"""No field of a row is trusted: what is not as it must be is one sentence with file and place."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace

import datasets
import pytest

from furina.data.items import Instruction, Problem, Program, Question
from furina.data.parsing import number_text
from furina.data.sources import load_items
from furina.data.tasks import get_task
from furina.errors import DataError

ARC = {"id": "1", "question": "What floats?", "answerKey": "B"}
ARC |= {"choices": {"text": ["a brick", "a cork"], "label": ["A", "B"]}}
CSQA = {"stem": "Why?", "choices": [{"label": c, "text": f"so {c}"} for c in "ABCDE"]}
MATHS = {"instruction": "How many?", "input": "", "output": "", "answer": "18.0"}
SIQA = {"context": "Ann ran.", "question": "Why?", "label": "1"}

ROWS = {
    "arc_easy": ARC,
    "openbookqa": {**ARC, "question_stem": "What floats?"},
    "commonsense_qa": {"id": "1", "question": CSQA, "answerKey": "C"},
    "boolq": {"question": "is tea hot", "passage": "Tea is hot.", "answer": True},
    "piqa": {"goal": "Cut bread", "sol1": "a knife", "sol2": "a spoon", "label": 0},
    "social_iqa": {**SIQA, "answerA": "late", "answerB": "fun", "answerC": "fear"},
    "winogrande": {"sentence": "Ann _ Bea", "option1": "saw", "option2": "met", "answer": "2"},
    "hellaswag": {"activity_label": "Home", "ctx": "He", "endings": list("abcd"), "label": 3},
    "gsm8k": {"question": "How much?", "answer": "It is 5.\n#### 5"},
    "math": {"problem": "What is 1?", "solution": r"It is \boxed{1}."},
    "addsub": MATHS,
    "aqua": {**MATHS, "answer": "B"},
    "mawps": {"original_text": "How many?", "equation": "x=3", "ans": 3.0},
    "humaneval": {"instruction": "Add.", "input": "", "output": "a + b"},
}
SPLIT = {"addsub": "test", "aqua": "test", "math": "test"}
TEXTS = {  # a text of each row that is not to be blank, if it has one
    **dict.fromkeys(["arc_easy", "boolq", "social_iqa", "gsm8k"], "question"),
    **{"openbookqa": "question_stem", "piqa": "sol2", "winogrande": "option1", "hellaswag": "ctx"},
    **{"math": "problem", "addsub": "instruction", "aqua": "instruction", "humaneval": "output"},
    **{"mawps": "original_text", "commonsense_qa": "answerKey"},
}


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a task's file of these rows, good ones in front of them."""

    def of(task, *rows):
        split = SPLIT.get(task, "train")
        path = tmp_path / get_task(task).files[split].pattern.replace("*", "rows")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in rows]
        text = f"[{','.join(lines)}]" if ".jsonl" not in path.name else "\n\n".join(lines)
        path.write_bytes(gzip.compress(text.encode()))
        return load_items(task, split, "folder", tmp_path)

    return of


@pytest.mark.parametrize("task", sorted(ROWS))
@pytest.mark.parametrize("value", [None, math.nan, 3, ["a"], {"a": "b"}, "half \ud800"])
def test_what_is_no_text_is_never_asked(read, task, value):
    place = (
        "Line 3"
        if get_task(task).files[SPLIT.get(task, "train")].pattern.count("l.gz")
        else "Row 2"
    )
    assert read(task, ROWS[task])
    with pytest.raises(DataError, match=rf"^{place} of .*\.gz is not as expected"):
        read(task, ROWS[task], {**ROWS[task], TEXTS[task]: value})
    with pytest.raises(DataError, match=f"it has no field '{TEXTS[task]}'"):
        read(task, {name: kept for name, kept in ROWS[task].items() if name != TEXTS[task]})


@pytest.mark.parametrize(
    ("task", "change", "reason"),
    [
        ("arc_easy", {"choices": {"text": "ab", "label": ["A", "B"]}}, "no list of texts"),
        ("arc_easy", {"choices": {"text": ["a", None], "label": ["A", "B"]}}, "no list of texts"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": "AB"}}, "no list of texts"),
        ("arc_easy", {"choices": {"text": list("abc"), "label": ["A", "B"]}}, "3 texts, not 2"),
        ("arc_easy", {"choices": {"text": ["a", "b"], "label": ["B", "B"]}}, "repeat one"),
        ("arc_easy", {"choices": {"text": ["a", " "], "label": ["A", "B"]}}, "a blank choice"),
        ("arc_easy", {"question": "\n"}, "a blank stem"),
        ("arc_easy", {"id": None}, "'id' is None"),
        ("arc_easy", {"answerKey": "AB"}, "none of the labels A, B"),
        ("hellaswag", {"endings": "abcd"}, "no list of texts"),
        ("hellaswag", {"endings": list("abc")}, "3 texts, not 4"),
        ("hellaswag", {"endings": ["a", "b", "c", "  "]}, "a blank choice"),
        ("hellaswag", {"label": 1.0}, "1.0 and no whole number"),
        ("hellaswag", {"label": 4}, "4 choices and answer 4"),
        ("piqa", {"label": True}, "True and no whole number"),
        ("piqa", {"label": -1}, "-1 and counts from 0"),
        ("piqa", {"sol1": ""}, "a blank choice"),
        ("winogrande", {"answer": "0"}, "counts from 1"),
        ("social_iqa", {"label": "4"}, "3 choices and answer 3"),
        ("boolq", {"answer": "no"}, "'no' and no whole number"),
        ("boolq", {"answer": None}, "None and no whole number"),
        ("commonsense_qa", {"question": {**CSQA, "choices": [CSQA["choices"][2]] * 5}}, "repeat"),
        ("addsub", {"answer": None}, "None is no number"),
        ("addsub", {"answer": True}, "True is no number"),
        ("addsub", {"answer": math.nan}, "nan is no number"),
        ("addsub", {"answer": "1,5"}, "'1,5' is no number"),
        ("gsm8k", {"answer": "#### Infinity"}, "Infinity' is no number"),
        ("mawps", {"ans": math.inf}, "inf is no number"),
        ("aqua", {"answer": "BC"}, "none of the letters"),
        ("humaneval", {"input": None}, "'input' is None"),
    ],
)
def test_a_field_that_is_not_as_it_must_be_is_named(read, task, change, reason):
    with pytest.raises(DataError, match=f"is not as expected .*{reason}.*: mend or leave it out"):
        read(task, {**ROWS[task], **change})


@pytest.mark.parametrize("row", [None, "text", [1], 5])
def test_a_row_that_is_no_object_is_one_sentence(read, row):
    for task in ("arc_easy", "addsub"):
        with pytest.raises(DataError, match="no object with named fields"):
            read(task, row)


@pytest.mark.parametrize("content", ["5", '{"a": 1}', "null"])
def test_a_file_that_holds_no_list_is_one_sentence(tmp_path, content):
    path = tmp_path / get_task("addsub").files["test"].pattern
    path.parent.mkdir()
    path.write_bytes(gzip.compress(content.encode()))
    with pytest.raises(DataError, match=r"json\.gz is damaged \(it holds no list\)"):
        load_items("addsub", "test", "folder", tmp_path)


def _mmlu(tmp_path, text):
    path = tmp_path / "mmlu" / "dev" / "virology_dev.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return load_items("mmlu", "train", "folder", tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("What?,a,b,c,d,C,", "'cells' has 7 texts, not 6"),
        ("What?,a,b,c,C", "'cells' has 5 texts, not 6"),
        ("What?;a;b;c;d;C", "'cells' has 1 texts, not 6"),
        ("What?,a,b,c,d,BC", "'BC' is none of the labels A, B, C, D"),
        ("What?,a,b,c,d,E", "'E' is none"),
        ("What?,a,b,c,d,", "'' is none"),
        ("What?,a,,c,d,C", "a blank choice"),
        (",a,b,c,d,C", "a blank stem"),
    ],
)
def test_a_line_of_mmlu_has_a_question_four_choices_and_their_letter(tmp_path, line, reason):
    good = '"Two\nlines?",a,b,c,d,C\n\n'
    assert _mmlu(tmp_path, good)[0].answer == 2
    with pytest.raises(DataError, match=rf"^Line 4 of .*virology_dev\.csv .*{reason}"):
        _mmlu(tmp_path, f"{good}{line}\n")


def test_a_byte_order_mark_is_no_part_of_the_first_cell(tmp_path):
    (question,) = _mmlu(tmp_path, '\ufeff"What, if any?",a,b,c,d,C\n')
    assert (question.stem, question.choices, question.answer) == ("What, if any?", tuple("abcd"), 2)


def test_a_row_of_the_hub_is_checked_and_counted(monkeypatch):
    row = {"subject": "law", "question": "Why?", "choices": list("abcd"), "answer": 1}
    rows = [row, {**row, "choices": ["a", "b", "c", None]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    with pytest.raises(DataError, match=r"^Row 2 of cais/mmlu test is not as expected"):
        load_items("mmlu", "test", "hub")


@pytest.mark.parametrize("answer", ["1,600", "-1,234,567.50", ".5", "1e-05", "+3", "7."])
def test_a_number_may_have_commas_between_thousands(answer):
    assert float(number_text(answer)) == float(answer.replace(",", ""))


@pytest.mark.parametrize("answer", ["1,5", "1,60", "1600,", "nan", "1_000", "٣", "", ".", "-inf"])
def test_what_is_no_finite_number_is_no_answer(answer):
    with pytest.raises(ValueError, match="is no number"):
        number_text(answer)


ITEMS = [
    (Question("1", "Why?", ("a", "b"), 0), ["id", "stem"]),
    (Problem("1", "Why?", "So.", "3"), ["id", "question", "answer"]),
    (Program("1", "def f():", "f", "pass", "pass"), ["prompt", "entry_point"]),
    (Instruction("1", "Do.", "", ""), ["instruction"]),
]


@pytest.mark.parametrize(("item", "fields"), ITEMS, ids=lambda value: type(value).__name__)
def test_an_item_made_by_hand_is_checked_too(item, fields):
    for field in fields:
        for value in (None, "", " \n", "\udc00"):
            with pytest.raises(DataError, match=f"has a .*{field}"):
                replace(item, **{field: value})


@pytest.mark.parametrize(
    ("parse", "row"),
    [
        (get_task("svamp").hub["test"].parse, {"Body": "He ate", "Question": "?", "Answer": "2"}),
        (get_task("multiarith").hub["test"].parse, {"question": "?", "final_ans": "2"}),
        (
            get_task("aqua").hub["test"].parse,
            {"question": "?", "options": ["A)2", "B)3"], "rationale": "So.", "correct": "B"},
        ),
        (
            get_task("boolq").wheel["train"].parse,
            {"query": "T\nQuestion: is it?\nAnswer:", "choices": ["yes", "no"], "gold": 0},
        ),
        (
            get_task("hellaswag").wheel["train"].parse,
            {"query": "A: b", "choices": list("abcd"), "gold": 0},
        ),
        (
            get_task("arc_easy").wheel["test"].parse,
            {"id": "1", "query": "Question: ?\nAnswer:", "choices": ["a", "b"], "gold": 1},
        ),
    ],
)
def test_no_reader_of_another_source_takes_a_null(parse, row):
    parse(row)
    for name in row:
        with pytest.raises(ValueError, match=f"'{name}' is None|None is no number"):
            parse({**row, name: None})
