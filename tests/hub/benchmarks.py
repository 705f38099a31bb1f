"""The benchmarks' public repositories: names, configurations, files and columns of the hub.

They are written from the data cards (huggingface.co/datasets/NAME), not from this project's
readers; where a card says nothing of its columns, from what is named beside the repository. The
rows are made up. Every row says in its text of which configuration, split and number it is, its
right choice is RIGHT, and the answer to a problem is its number.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import yaml
from datasets import ClassLabel, Features, List, Value

RIGHT = "the right one"
ROWS = 12
SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
TEXT, TEXTS = Value("string"), List(Value("string"))
CHOICES = {"text": TEXTS, "label": TEXTS}

Row = dict[str, Any]


class Public(NamedTuple):
    """A repository of Parquet files: `row` takes what a row is to say, and its number."""

    columns: dict[str, Any]
    configurations: dict[str, tuple[str, ...]]
    row: Callable[[str, int], Row]
    folder: str = ""
    """Where the files lie; a folder of the configuration's name if empty."""
    default: str = ""
    """The configuration that a card marks as default."""


def _choices(number: int, count: int) -> list[str]:
    return [RIGHT if index == number % count else f"wrong {index}" for index in range(count)]


def _labelled(stem: str, *labels: str) -> Callable[[str, int], Row]:
    """Return rows whose choices have the labels of one string after the other."""

    def row(says: str, number: int) -> Row:
        names = list(labels[number % len(labels)])
        choices = {"text": _choices(number, len(names)), "label": names}
        key = names[number % len(names)]
        return {"id": f"id-{number}", stem: says, "choices": choices, "answerKey": key}

    return row


def _commonsense(says: str, number: int) -> Row:
    return {**_labelled("question", "ABCDE")(says, number), "question_concept": "concept"}


def _boolq(says: str, number: int) -> Row:
    return {"question": says, "answer": number % 2 == 1, "passage": f"A passage on {number}."}


def _piqa(says: str, number: int) -> Row:
    first, second = _choices(number, 2)
    return {"goal": says, "sol1": first, "sol2": second, "label": number % 2}


def _siqa(says: str, number: int) -> Row:
    answers = dict(zip(("answerA", "answerB", "answerC"), _choices(number, 3), strict=True))
    return {"context": "Ann did it.", "question": says, **answers, "label": str(number % 3 + 1)}


def _hellaswag(says: str, number: int) -> Row:
    return {
        "ind": number,
        "activity_label": "Baking",
        "ctx_a": f"{says}.",
        "ctx_b": "then she",
        "ctx": f"{says}. then she",
        "endings": _choices(number, 4),
        "source_id": f"activitynet~{number}",
        "split": "train",
        "split_type": "indomain",
        "label": str(number % 4),
    }


def _winogrande(says: str, number: int) -> Row:
    first, second = _choices(number, 2)
    sentence = f"{says}: Ann met Bob, so _ waved."
    return {
        "sentence": sentence,
        "option1": first,
        "option2": second,
        "answer": str(number % 2 + 1),
    }


def _gsm8k(says: str, number: int) -> Row:
    return {"question": says, "answer": f"It is {number}*1=<<{number}*1={number}>>.\n#### {number}"}


def _math(says: str, number: int) -> Row:
    solution = rf"It is $\boxed{{{number}}}$."
    return {"problem": says, "level": "Level 2", "type": "Algebra", "solution": solution}


def _mmlu(says: str, number: int) -> Row:
    choices = _choices(number, 4)
    return {"question": says, "subject": "anatomy", "choices": choices, "answer": number % 4}


def _humaneval(says: str, number: int) -> Row:
    return {
        "task_id": f"HumanEval/{number}",
        "prompt": f'def f{number}():\n    """{says}"""\n',
        "canonical_solution": f"    return {number}\n",
        "test": f"def check(candidate):\n    assert candidate() == {number}\n",
        "entry_point": f"f{number}",
    }


def _aqua(says: str, number: int) -> Row:
    options = [f"{'ABCDE'[index]}){text}" for index, text in enumerate(_choices(number, 5))]
    rationale, correct = f"As {number}.\nAnswer {RIGHT}", "ABCDE"[number % 5]
    return {"question": says, "options": options, "rationale": rationale, "correct": correct}


def _texts(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, TEXT)


ALL = ("train", "validation", "test")
ARC = {"ARC-Challenge": ALL, "ARC-Easy": ALL}
LABELLED = {"choices": CHOICES, "answerKey": TEXT}
LETTERS = ClassLabel(names=["A", "B", "C", "D"])
HELLASWAG = _texts("activity_label", "ctx_a", "ctx_b", "ctx", "source_id", "split", "split_type")
PARQUET = {
    "allenai/ai2_arc": Public(
        {**_texts("id", "question"), **LABELLED}, ARC, _labelled("question", "ABCD", "1234", "ABC")
    ),
    "allenai/openbookqa": Public(
        {**_texts("id", "question_stem"), **LABELLED},
        {"additional": ALL, "main": ALL},
        _labelled("question_stem", "ABCD"),
        default="main",
    ),
    "tau/commonsense_qa": Public(
        {**_texts("id", "question", "question_concept"), **LABELLED},
        {"default": ALL},
        _commonsense,
        folder="data",
    ),
    "google/boolq": Public(
        {"question": TEXT, "answer": Value("bool"), "passage": TEXT},
        {"default": ALL[:2]},
        _boolq,
        folder="data",
    ),
    # Columns as in ybisk/piqa, of which it is the copy that lm-eval's task reads.
    "baber/piqa": Public(
        {**_texts("goal", "sol1", "sol2"), "label": ClassLabel(names=["0", "1"])},
        {"default": ALL},
        _piqa,
        folder="data",
    ),
    # Columns as in allenai/social_i_qa, of which it is the copy that lm-eval's task reads.
    "lighteval/siqa": Public(
        _texts("context", "question", "answerA", "answerB", "answerC", "label"),
        {"default": ALL[:2]},
        _siqa,
        folder="data",
    ),
    "Rowan/hellaswag": Public(
        {"ind": Value("int32"), **HELLASWAG, "endings": TEXTS, "label": TEXT},
        {"default": ALL},
        _hellaswag,
        folder="data",
    ),
    "allenai/winogrande": Public(
        _texts("sentence", "option1", "option2", "answer"),
        {f"winogrande_{size}": ALL for size in ("debiased", "l", "xl")},
        _winogrande,
    ),
    "openai/gsm8k": Public(
        _texts("question", "answer"), dict.fromkeys(("main", "socratic"), ("train", "test")), _gsm8k
    ),
    "EleutherAI/hendrycks_math": Public(
        _texts("problem", "level", "type", "solution"),
        dict.fromkeys(SUBJECTS, ("train", "test")),
        _math,
    ),
    "cais/mmlu": Public(
        {"question": TEXT, "subject": TEXT, "choices": TEXTS, "answer": LETTERS},
        {"all": ("auxiliary_train", "dev", "validation", "test"), "anatomy": ("dev", "test")},
        _mmlu,
    ),
    "openai/openai_humaneval": Public(
        _texts("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        {"openai_humaneval": ("test",)},
        _humaneval,
        default="openai_humaneval",
    ),
    "deepmind/aqua_rat": Public(
        {"question": TEXT, "options": TEXTS, "rationale": TEXT, "correct": TEXT},
        {"raw": ALL, "tokenized": ALL},
        _aqua,
        default="raw",
    ),
}


def _svamp(says: str, number: int) -> Row:
    question = "How many are there?"
    return {
        "ID": f"chal-{number}",
        "Body": says,
        "Question": question,
        "Equation": f"( {number}.0 + 0.0 )",
        "Answer": str(number),
        "Type": "Addition",
        "question_concat": f"{says} {question}",
    }


def _multiarith(says: str, number: int) -> Row:
    return {"question": f" {says} ", "final_ans": str(number)}


def _math500(says: str, number: int) -> Row:
    row = _math(says, number)
    subject, identifier = row.pop("type"), f"test/algebra/{number}.json"
    return {**row, "level": 2, "answer": str(number), "subject": subject, "unique_id": identifier}


def _code_alpaca(says: str, number: int) -> Row:
    return {"instruction": says, "input": "", "output": str(number)}


# Files of JSON, by path and split; their cards name no columns. Those of ChilleD's two are as in
# facebookresearch/airs-bench (SVAMP) and in the many scripts that read `final_ans` (MultiArith).
JSON: dict[str, tuple[dict[str, str], Callable[[str, int], Row]]] = {
    "ChilleD/SVAMP": ({"train.json": "train", "test.json": "test"}, _svamp),
    "ChilleD/MultiArith": ({"train.json": "train", "test.json": "test"}, _multiarith),
    "HuggingFaceH4/MATH-500": ({"test.jsonl": "test"}, _math500),
    "sahil2801/CodeAlpaca-20k": ({"code_alpaca_20k.json": "train"}, _code_alpaca),
}


def says(configuration: str, split: str, number: int) -> str:
    """Return what a row's text says."""
    return f"{configuration} {split} {number}"


def _rows(row: Callable[[str, int], Row], configuration: str, split: str) -> list[Row]:
    return [row(says(configuration, split, number), number) for number in range(ROWS)]


def _parquet(columns: Mapping[str, Any], rows: list[Row]) -> bytes:
    buffer = io.BytesIO()
    table = pyarrow.Table.from_pylist(rows, schema=Features(columns).arrow_schema)
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def _published(public: Public) -> dict[str, bytes]:
    files, card = {}, []
    for configuration, splits in public.configurations.items():
        folder = public.folder or configuration
        places = [{"split": split, "path": f"{folder}/{split}-*"} for split in splits]
        mark = {"default": True} if configuration == public.default else {}
        card.append({"config_name": configuration, "data_files": places, **mark})
        for split in splits:
            rows = _rows(public.row, configuration, split)
            files[f"{folder}/{split}-00000-of-00001.parquet"] = _parquet(public.columns, rows)
    head = yaml.safe_dump({"configs": card}, sort_keys=False)
    return {"README.md": f"---\n{head}---\n".encode(), **files}


def _listed(places: dict[str, str], row: Callable[[str, int], Row]) -> dict[str, bytes]:
    files = {}
    for path, split in places.items():
        rows = _rows(row, "default", split)
        lines = "".join(json.dumps(one) + "\n" for one in rows)
        files[path] = (lines if path.endswith("l") else json.dumps(rows)).encode()
    return files


def repositories() -> dict[str, dict[str, bytes]]:
    """Return the files of each repository."""
    return {
        **{name: _published(public) for name, public in PARQUET.items()},
        **{name: _listed(*listed) for name, listed in JSON.items()},
    }
