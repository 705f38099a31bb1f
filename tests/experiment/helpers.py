"""Made-up questions as a local data folder, and runs on the tiny Llama that take a second."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from furina.evaluation.latency import measure_latency
from furina.experiment import cell
from furina.experiment.config import RunConfig

STEMS = {"arc_easy": "question", "openbookqa": "question_stem"}
SIZES = {"train": 30, "test": 12}
OPTIONS: dict[str, dict[str, Any]] = {
    "furina": {"rank": 2, "num_experts": 4, "dropout": 0.2},
    "lora": {"rank": 2},
    "molora": {"rank": 2, "num_experts": 3},
    "base": {},
}
SMALL: dict[str, Any] = {
    "backbone": "tiny-llama",
    "dtype": "float32",
    "attention": "eager",
    "steps": 6,
    "batch_size": 4,
    "micro_batch_size": 2,
    "learning_rate": 0.01,
    "warmup_steps": 1,
    "validation_size": 4,
    "checkpoint_interval": 2,
    "test_size": 8,
    "eval_batch_size": 8,
    "latency_rounds": 1,
    "latency_warmup": 0,
}


def write_data(folder: Path, splits: tuple[str, ...] = ("train", "test")) -> str:
    """Write both tasks' rows and return the folder as a config takes it."""
    for task, stem in STEMS.items():
        (folder / task).mkdir(parents=True)
        for split in splits:
            rows = (_row(split, number, stem) for number in range(SIZES[split]))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / task / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    return str(folder)


def _row(split: str, number: int, stem: str) -> dict[str, Any]:
    return {
        "id": f"{split}-{number}",
        stem: f"In the {split} list, what follows {number}?",
        "choices": {"text": [str(number + 2 - i) for i in range(3)], "label": list("ABC")},
        "answerKey": "B",
    }


def tiny(data_dir: str, method: str = "furina", **changes: Any) -> RunConfig:
    """Return a run of a few steps of two micro-batches each."""
    start = {**SMALL, "data_dir": data_dir, "method": method, "adapter": OPTIONS[method]}
    return RunConfig().updated({**start, **changes})


def time_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let cells time three tokens in place of a hundred."""
    quick = partial(measure_latency, prompt_tokens=4, new_tokens=3)
    monkeypatch.setattr(cell, "measure_latency", quick)
