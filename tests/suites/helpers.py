"""Suites written to a folder, and what is read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from furina.suites import Suite

SEARCH = {"study": "search"}


def write_suite(folder: Path, defaults: dict[str, Any], **files: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    for name, content in {"defaults": defaults, **files}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


def values(suite: Suite, *names: str) -> list[tuple[Any, ...]]:
    plain = [{**run.to_dict(), **run.adapter} for run in suite.runs]
    return [tuple(run.get(name) for name in names) for run in plain]


def lora(**content: Any) -> dict[str, Any]:
    return {"method": "lora", **content}
