"""The resolved runs of a suite as YAML, each value with what gives it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import yaml

from furina.experiment.config import RunConfig
from furina.suites.suite import Suite

DEFAULT = "default"
WIDEST = 44
"""Columns that a value takes before its origin, where it needs no more."""


def resolved_text(suite: Suite) -> str:
    """Return every run of a suite with all its values, and the file or option of each.

    The dtype that "auto" stands for is this machine's.
    """
    runs = zip(suite.runs, suite.origins, strict=True)
    return "\n\n".join("\n".join(_lines(run, origins)) for run, origins in runs)


def _lines(run: RunConfig, origins: Mapping[str, str]) -> Iterator[str]:
    yield f"# {run.title}"
    adapter = run.adapter_config()
    for name, value in run.resolved().to_dict().items():
        origin = origins.get(name, DEFAULT)
        if name == "adapter" and adapter is not None:
            yield "adapter:"
            for option, chosen in adapter.to_dict().items():
                origin = origins.get(f"adapter.{option}", f"{DEFAULT} of {run.method}")
                yield _line(f"  {option}", chosen, origin)
        elif name == "dtype" and run.dtype == "auto":
            yield _line(name, value, f"{origin}: auto, on this machine")
        else:
            yield _line(name, value, origin)


def _line(name: str, value: object, origin: str) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump({0: plain}, default_flow_style=True, width=math.inf, sort_keys=False)
    given = f"{name}: {text.strip()[4:-1]}"
    return f"{given:{WIDEST}}  # {origin}"
