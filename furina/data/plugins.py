"""What the modules of a folder define: a new file there is a new task or protocol."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any


def defined_in(package: str, kind: type) -> Iterator[Any]:
    """Yield every object of `kind` that a module of `package` holds under a name, in order."""
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        yield from (value for value in vars(module).values() if isinstance(value, kind))
