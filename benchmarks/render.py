"""Make the page and the figure of reports again from their JSON.

python -m benchmarks.render results/training/step.json results/merging/merging.json
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from benchmarks.common.command import Report
from benchmarks.common.show import Page, write

MODULES = {
    "step": "training.step_page",
    "attention": "training.attention",
    "finetuning": "training.finetuning_page",
    "profile": "training.step_profile",
    "scaling": "training.scaling_page",
    "latency": "latency.page",
    "merging": "merging.page",
    "engine": "serving.vllm_page",
    "gguf": "serving.gguf_engine",
}
"""What shows a report, by the name of its files."""


def page_of(stem: str, report: Report) -> Page:
    """Return the page of a report, which `stem` tells the kind of."""
    made: Page = importlib.import_module(f"benchmarks.{MODULES[stem]}").page(report)
    return made


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        report = json.loads(file.read_text("utf-8"))
        write(file.with_suffix(""), report, page_of(file.stem, report))
