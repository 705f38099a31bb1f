"""The command line of a benchmark: shared options, what runs, what is written, what failed."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.show import Page, write
from furina.errors import FurinaError
from furina.records.environment import provenance

Report = dict[str, Any]
NOT_SETTINGS = ("results", "moe_peft", "vllm", "environment", "adapter_path", "data_dir", "one")
"""Options that are of one machine alone, or of one of several processes."""


def device(word: str) -> str:
    """Return the name of a device that is there, for argparse."""
    try:
        torch.empty(0, device=word)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{word}: {reason}") from error
    return word


SHARED: dict[str, dict[str, Any]] = {
    "backbone": {"default": "smollm2-135m-instruct", "help": "asset, folder or name"},
    "dtype": {"default": "bfloat16"},
    "device": {"type": device, "default": "cuda" if torch.cuda.is_available() else "cpu"},
    "rank": {"type": int, "default": 128, "help": "of all experts together"},
    "experts": {"type": int, "default": 8},
    "rounds": {"type": int, "default": 5},
    "threads": {"type": int, "default": torch.get_num_threads()},
    "seed": {"type": int, "default": 0},
    "results": {"type": Path, "help": "folder for the report's files"},
}


class Parser(argparse.ArgumentParser):
    """A parser with options of `SHARED`, by name, whose defaults may be others."""

    def __init__(self, purpose: str | None, shared: str, **defaults: Any) -> None:
        """Describe it by the first line of `purpose`."""
        super().__init__(description=(purpose or "").partition("\n")[0])
        for name in shared.split():
            self.add_argument(f"--{name}", **SHARED[name])
        self.set_defaults(**defaults)

    def checked(
        self, arguments: Sequence[str] | None, positive: str, **least: int
    ) -> argparse.Namespace:
        """Parse; refuse options of `positive` below 1, others below `least`, and ranks of no size.

        Exits with a sentence, as it does for words that it does not know.
        """
        options = self.parse_args(arguments)
        for name, bound in {**dict.fromkeys(positive.split(), 1), **least}.items():
            value = getattr(options, name)
            if min(value if isinstance(value, list) else [value], default=bound) < bound:
                self.error(f"--{name.replace('_', '-')} must be at least {bound}")
        if {"rank", "experts"} <= vars(options).keys() and options.rank % options.experts:
            self.error("--experts must divide --rank")
        return options


def command_line(script: str, arguments: Sequence[str]) -> str:
    """Return the command that runs a script such as training.step.

    Of an absolute path only the last part: the rest would be of one machine alone.
    """
    plain = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["python", "-m", f"benchmarks.{script}", *plain])


def described(options: argparse.Namespace, command: str, **packages: str) -> Report:
    """Return what every report says of itself: command, settings and environment."""
    environment = asdict(provenance())
    environment["packages"] |= packages
    settings = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    return {"command": command, "settings": settings, "environment": environment}


def select(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Return the variants that `only` names, with or without what stands before their slash.

    Exits with the choice where a word names none.
    """
    words = {name: {name, name.rpartition("/")[2]} for name in names}
    if unknown := sorted(set(only).difference(*words.values())):
        sys.exit(f"error: no variant is called {', '.join(unknown)}; choose of {', '.join(names)}")
    return [name for name in names if words[name] & set(only)]


def run(
    script: str,
    parse: Callable[[Sequence[str]], argparse.Namespace],
    measure: Callable[[argparse.Namespace, str], Report],
    stem: str = "",
    page: Callable[[Report], Page] | None = None,
    arguments: Sequence[str] | None = None,
) -> Report:
    """Measure what the command line asks for; print the page, and in the last line the report.

    Then write both into --results as `stem`.json and .md, with the figure as .svg. A FurinaError
    ends the process with its sentence.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        report = measure(options, command_line(script, arguments))
        shown = page(report) if page else None
        if shown:
            print(shown.markdown(stem))
        print(json.dumps(report), flush=True)  # before the files: a full disk must not lose it
        if shown and options.results:
            write(options.results / stem, report, shown)
    except FurinaError as error:
        sys.exit(f"error: {error}")
    return report
