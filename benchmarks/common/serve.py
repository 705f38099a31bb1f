"""The worker's side of worker.py; needs Python alone, so that every peer can use it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

Commands = Mapping[str, Callable[..., object]]


def serve(load: Callable[[dict[str, Any]], tuple[Commands, object]]) -> None:
    """Answer each line of standard input by one of JSON, until there is none.

    The first is the setup: `load` makes of it the commands and its answer. Each other is
    [command, argument, …]. An error is answered by {"error": reason}. What is printed meanwhile
    goes to stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands: Commands | None = None
    for line in sys.stdin:
        answer: object
        try:
            if commands is None:
                commands, answer = load(json.loads(line))
            else:
                command, *arguments = json.loads(line)
                answer = commands[command](*arguments)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def versions(peer: str, package: str) -> dict[str, str]:
    """Return the version of a peer's package and, named as its own, those of what it runs on."""
    own = {f"{name} ({peer})": name for name in ("torch", "transformers")}
    names = {peer: package, **own}
    return {label: importlib.metadata.version(name) for label, name in names.items()}
