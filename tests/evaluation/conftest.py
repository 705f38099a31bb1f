"""Questions written for these tests, on tiny random models."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from furina.backbones.load import load_backbone
from furina.backbones.tiny import tiny_tokenizer
from furina.data.items import Question
from furina.data.parsing import to_labelled_row

BOS, EOS = 1, 2
STEMS = [
    ("Which of these can float on a lake?", ("a brick", "a cork", "an anvil", "a coin"), 1),
    ("What is 7 + 5?", ("10", "11", "12", "13"), 2),
    ("A shadow is longest", ("at noon", "at dawn", "at midnight"), 1),
    ("What measures heat — in °C?", ("ruler", "scale", "clock", "compass", "thermometer"), 4),
    ("Ice is {{water}} that is", ("frozen", "boiled", "dried", "painted"), 0),
    ("Bees make", ("honey", "bricks", "rain", "a very long tale about nothing"), 0),
    ("The Moon goes round", ("Mars", "the Sun", "Venus", "the Earth"), 3),
    ("Which is a metal?", ("wood", "iron", "air", "milk"), 1),
    ("Seeds grow into", ("stones", "clouds", "plants", "rivers"), 2),
    ("[1, 2] is a", ("list", "cat"), 0),
]
QUESTIONS = [
    Question(f"own-{number}", stem, choices, answer)
    for number, (stem, choices, answer) in enumerate(STEMS)
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def questions() -> list[Question]:
    return list(QUESTIONS)


@pytest.fixture
def model():
    return load_backbone("tiny-llama", dtype="float32")


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """The same questions as a local data folder, in the public row format."""
    folder = tmp_path / "data" / "arc_easy"
    folder.mkdir(parents=True)
    text = "".join(json.dumps(to_labelled_row(question)) + "\n" for question in QUESTIONS)
    (folder / "test.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return folder.parent


def templated(template: str):
    """Return a tokenizer that adds its special tokens to every text as the template says."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return tokenizer
