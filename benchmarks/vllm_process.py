"""vLLM's engines, each in a process of its own environment, to be asked with token ids."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from furina.errors import FurinaError

WORKER = Path(__file__).with_name("vllm_worker.py")
ENVIRONMENT = Path(__file__).parents[1] / ".venv-vllm"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else the number of threads is not ours to say
}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM makes room for."""
PATIENCE = 60
"""Seconds that an engine may take to end."""

Tokens = list[int]


class EngineError(FurinaError):
    """An engine cannot run or answer, for the reason given."""


def room_for(rank: int) -> int:
    """Return the smallest rank that vLLM makes room for and that holds `rank`.

    Raises EngineError if there is none.
    """
    found = next((each for each in RANKS if each >= rank), None)
    if found is None:
        raise EngineError(f"vLLM holds adapters up to rank {RANKS[-1]}, and this has rank {rank}")
    return found


def interpreter(environment: Path) -> Path:
    """Return the environment's Python; raises EngineError if it was not made or not to the end."""
    if not (Path(environment) / ".installed").exists():
        raise EngineError("vllm is not installed: run `make vllm`")
    return Path(environment) / "bin" / "python"


class Engine:
    """One engine; `load_seconds` is what making it took, imports not included."""

    def __init__(self, environment: Path, threads: int, **setup: Any) -> None:
        """Start a fresh worker and load what `setup` says, see vllm_worker.Engine.

        Raises EngineError if the environment is missing or the model does not load.
        """
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - `close` does
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = self._start(environment, threads)
            loaded = self._ask(setup)
        except BaseException:
            self.close()
            raise
        self.load_seconds: float = loaded["seconds"]
        self.versions: dict[str, str] = loaded["versions"]

    def _start(self, environment: Path, threads: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(interpreter(environment)), "-W", "ignore", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **SETTINGS, "OMP_NUM_THREADS": str(threads)},
        )

    def times(self, prompt: Tokens, new_tokens: int) -> list[float]:
        """Return the seconds of each token that follows the prompt."""
        seconds: list[float] = self._ask(["times", prompt, new_tokens])
        if len(seconds) != new_tokens:
            raise EngineError(f"vLLM generated {len(seconds)} tokens, not {new_tokens}")
        return seconds

    def generate(self, prompts: list[Tokens], new_tokens: int) -> list[Tokens]:
        """Return the tokens that follow each prompt, greedily."""
        generated: list[Tokens] = self._ask(["generate", prompts, new_tokens])
        return generated

    def score(self, prompts: list[Tokens]) -> list[dict[str, Any]]:
        """Return, for each prompt, `top` and `logprob` as vllm_worker.Engine.score does."""
        scores: list[dict[str, Any]] = self._ask(["score", prompts])
        return scores

    def _ask(self, question: object) -> Any:
        assert self._process and self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            status = self._process.wait()
            raise EngineError(f"vLLM's process ended with status {status}{self._last_words()}")
        value = json.loads(answer)
        if isinstance(value, dict) and "error" in value:
            raise EngineError((value["error"].splitlines() or ["an error without a word"])[0])
        return value

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line]
        return f": {lines[-1].strip()}" if lines else ""

    def close(self) -> None:
        """End the worker, which stops where its input does."""
        if self._process:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # type: ignore[union-attr]
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()  # type: ignore[union-attr]
        self._log.close()
