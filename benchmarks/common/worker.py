"""A script in an environment of its own that answers lines of JSON; common/serve.py is its side."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from furina.errors import FurinaError

ROOT = Path(__file__).parents[2]
PATIENCE = 60
"""Seconds that a worker may take to end."""


class WorkerError(FurinaError):
    """A worker cannot run or answer, for the reason given."""


def interpreter(environment: Path, name: str) -> Path:
    """Return an environment's Python; raises WorkerError if `make` did not finish it."""
    if not (environment / ".installed").exists():
        raise WorkerError(f"{name} is not installed: run `make {name.replace('_', '-')}`")
    return environment / "bin" / "python"


class Worker:
    """One process, which ends where its input does."""

    def __init__(
        self, name: str, environment: Path, script: Path, setup: dict[str, Any], **variables: str
    ) -> None:
        """Start `script` with the environment's Python; `loaded` is its answer to `setup`.

        Raises WorkerError if the environment is missing or the setup does not load.
        """
        self._name = name
        python = str(interpreter(environment, name.lower()))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` does
        self._process = subprocess.Popen(
            [python, "-P", "-W", "ignore", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        )
        try:
            self.loaded: dict[str, Any] = self._answer(setup)
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = self.loaded["versions"]

    def ask(self, command: str, *arguments: Any) -> Any:
        """Return the answer; raises WorkerError with the worker's reason, or its last words."""
        return self._answer([command, *arguments])

    def _answer(self, question: object) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._process.wait()
            words = f"{self._name}'s process ended with status {status}{self._last_words()}"
            raise WorkerError(words)
        value = json.loads(answer)
        if isinstance(value, dict) and "error" in value:
            raise WorkerError((value["error"].splitlines() or ["an error without a word"])[0])
        return value

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line]
        return f": {lines[-1].strip()}" if lines else ""

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
