"""One hub and one process that has it, with an empty cache, for all tests of a worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from furina.backbones.load import load_backbone, load_tokenizer
from tests.hub.benchmarks import repositories
from tests.hub.server import Hub

ROOT = Path(__file__).parents[2]
MODEL, LARGE = "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"
VOCABULARY = 90_000
"""Tokens of LARGE: the hub's library keeps of a download only whole blocks of 10 MB."""


def _saved(folder: Path, vocabulary: int | None) -> dict[str, bytes]:
    """Return a repository; one with a vocabulary has two files of weights, and others unread."""
    model = load_backbone("tiny-llama", "float32")
    if vocabulary:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    model.save_pretrained(folder, max_shard_size="12MB")
    load_tokenizer("tiny-llama").save_pretrained(folder)
    unread = {"original/params.json": b"{}"} if vocabulary else {}
    return {path.name: path.read_bytes() for path in folder.iterdir()} | unread


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub()
    for name, vocabulary in ((MODEL, None), (LARGE, VOCABULARY)):
        hub.repositories[name] = _saved(tmp_path_factory.mktemp("model"), vocabulary)
    for name, files in repositories().items():
        hub.repositories[f"datasets/{name}"] = files
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture
def hub(served: Hub) -> Iterator[Hub]:
    """The hub, which after a test is as it was."""
    before = dict(served.repositories)
    served.requests.clear()
    yield served
    served.repositories = before
    for settings in (served.refusals, served.cut, served.silent):
        settings.clear()


Call = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def process(served: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    home = tmp_path_factory.mktemp("home")
    own_names = ("HF_", "HUGGING", "FURINA_")
    kept = {name: text for name, text in os.environ.items() if not name.startswith(own_names)}
    own = {
        "HF_ENDPOINT": served.url,
        "HF_HOME": str(home / "hub"),
        "FURINA_CACHE_DIR": str(home / "furina"),
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_ETAG_TIMEOUT": "60",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    client = subprocess.Popen(
        [sys.executable, "-m", "tests.hub.client"],
        cwd=ROOT,
        env={**kept, **own},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert client.stdin and client.stdout
    streams = client.stdin, client.stdout

    def call(*words: object) -> dict[str, Any]:
        streams[0].write(json.dumps(words) + "\n")
        streams[0].flush()
        line = streams[1].readline()
        assert line, "the process has ended: its traceback is above"
        answer: dict[str, Any] = json.loads(line)
        return answer

    yield call
    client.kill()  # an orderly end takes seconds
    client.wait()


@pytest.fixture
def call(process: Call) -> Iterator[Call]:
    """Call a function of client.py by name; the cache is empty at first.

    Variables that a test sets are unset after it.
    """
    process("forget")
    names: set[str] = set()

    def noted(*words: Any) -> dict[str, Any]:
        if words[0] == "setenv":
            names.add(words[1])
        return process(*words)

    yield noted
    for name in names:
        process("setenv", name, None)
