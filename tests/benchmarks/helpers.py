"""What tests of several benchmarks share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest


def environment(folder: Path, worker: str) -> Path:
    """Make an environment with our interpreter and, as worker.py, a program for it."""
    (folder / "bin").mkdir()
    # A link would be looked up beside itself, without this environment's packages.
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / ".installed").touch()
    (folder / "worker.py").write_text(worker)
    return folder


def printed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the report in the last line that was printed."""
    report: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return report


def written(stem: Path) -> tuple[dict[str, Any], str]:
    """Return a report as it was written, without its stored page, and its page."""
    report = json.loads(stem.with_suffix(".json").read_text())
    del report["page"]
    return report, stem.with_suffix(".md").read_text()
