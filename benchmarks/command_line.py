"""What benchmarks share of their command lines, and what a report says of its own."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch


def command_line(script: str, arguments: Sequence[str]) -> str:
    """Return the command that runs benchmarks/`script`; of an absolute path only the last part.

    The rest of such a path would be of one machine alone.
    """
    plain = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["python", f"benchmarks/{script}", *plain])


def device(word: str) -> str:
    """Return the name of a device that is there, for argparse."""
    try:
        torch.empty(0, device=word)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{word}: {reason}") from error
    return word
