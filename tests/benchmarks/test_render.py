"""benchmarks/render.py: every recorded page and figure is that of its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common.worker import ROOT
from benchmarks.render import MODULES, page_of
from furina.reporting.figures import plots
from furina.reporting.pages.contents import BENCHMARKS

RECORDED = sorted(path for name in BENCHMARKS for path in (ROOT / "results" / name).rglob("*.json"))


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: str(file.relative_to(ROOT / "results")))
def test_the_recorded_page_and_figure_are_those_of_their_json(file: Path) -> None:
    page = page_of(file.stem, json.loads(file.read_text()))
    assert file.with_suffix(".md").read_text() == page.markdown(file.stem)
    drawn = file.with_suffix(".svg")
    assert drawn.exists() == (page.figure is not None)
    assert page.figure is None or drawn.read_text() == plots.svg(page.figure)


def test_every_kind_of_report_is_recorded() -> None:
    assert {file.stem for file in RECORDED} == MODULES.keys()
