"""The benchmarks, one file each: a module of this folder that defines `TASK` is a task."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from furina.data.tasks.base import Task
from furina.errors import ConfigurationError, nearest

__all__ = ["Task", "get_task", "tasks"]


@cache
def tasks() -> dict[str, Task]:
    """Return every task by name."""
    modules = (
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if info.name != "base"
    )
    return {module.TASK.name: module.TASK for module in modules}


def get_task(name: str) -> Task:
    """Return the task called `name`; raises ConfigurationError with the nearest known name."""
    if name not in tasks():
        raise ConfigurationError(f"There is no task {name!r}.{nearest(name, tasks())}")
    return tasks()[name]
