"""benchmarks/common: worker.py asks a process, serve.py answers there without furina."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common.worker import Worker, WorkerError
from tests.benchmarks.helpers import environment

PROGRAM = """
import sys
from benchmarks.common import memory
from benchmarks.common.serve import serve


def load(setup):
    print("what is printed is no answer")
    told = {"versions": {}, "setup": setup, "furina": "furina" in sys.modules}
    return {"add": lambda a, b: a + b, "end": lambda: sys.exit("no more")}, told


serve(load)
"""


def test_a_worker_answers_what_its_script_serves(tmp_path: Path) -> None:
    made = environment(tmp_path, PROGRAM)
    worker = Worker("peer", made, made / "worker.py", {"x": 1})
    try:
        assert worker.loaded == {"versions": {}, "setup": {"x": 1}, "furina": False}
        assert worker.ask("add", 2, 3) == 5
        with pytest.raises(WorkerError, match=r"^TypeError: "):
            worker.ask("add", 2, "a")
        with pytest.raises(WorkerError, match=r"^KeyError: 'subtract'$"):
            worker.ask("subtract", 2, 3)
        assert worker.ask("add", 2, 2) == 4
        with pytest.raises(WorkerError, match=r"^peer's process ended with status 1: no more$"):
            worker.ask("end")
    finally:
        worker.close()


def test_an_environment_that_make_did_not_finish_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerError, match=r"^moe_peft is not installed: run `make moe-peft`$"):
        Worker("moe_peft", tmp_path, tmp_path / "worker.py", {})
