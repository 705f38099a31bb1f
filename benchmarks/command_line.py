"""What a report says of how it was made."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path


def command_line(script: str, arguments: Sequence[str]) -> str:
    """Return the command that runs benchmarks/`script`; of an absolute path only the last part.

    The rest of such a path would be of one machine alone.
    """
    plain = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["python", f"benchmarks/{script}", *plain])
