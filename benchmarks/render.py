"""Make the page and the figure of reports again from their JSON.

python -m benchmarks.render results/training/step.json results/merging/merging.json
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

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


def shown(stem: str, report: Report) -> tuple[Page, Figure | None]:
    """Return the page of a report, and its figure if it has one."""
    module = importlib.import_module(f"benchmarks.{MODULES[stem]}")
    return module.page(report), getattr(module, "figure", lambda _: None)(report)


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        report = json.loads(file.read_text("utf-8"))
        write(file.with_suffix(""), report, *shown(file.stem, report))
