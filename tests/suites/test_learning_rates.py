"""The learning rates of the suites are those that the search found, from one grid for all."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from furina.adapters.furina import FurinaConfig
from furina.records import SearchRecord
from furina.reporting.read.suites import read_folder
from furina.reporting.tables.studies import best_point
from furina.suites.reading import read_suite

ROOT = Path(__file__).parents[2]
SEARCH = "search"


def trials() -> dict[str, list[SearchRecord]]:
    """Return the committed trials that trained, by method, with the magnitude's default multiplier.

    The table has FURINA's trials of other multipliers too, which no other method has.
    """
    default = FurinaConfig().magnitude_lr_multiplier
    found: dict[str, list[SearchRecord]] = defaultdict(list)
    for record in read_folder(ROOT / "results" / SEARCH, SearchRecord.read).values():
        if record.steps and record.magnitude_multiplier in (None, default):
            found[record.method].append(record)
    return found


def test_every_method_was_tried_with_one_grid_and_budget() -> None:
    planned = {run.method for run in read_suite(SEARCH).runs} - {"base"}
    grids = {
        method: sorted((t.learning_rate, t.protocol, t.steps, t.n) for t in found)
        for method, found in trials().items()
    }
    assert grids.keys() == planned
    assert len(set(map(tuple, grids.values()))) == 1


def test_every_method_does_worse_at_both_ends_of_the_grid() -> None:
    for method, found in trials().items():
        rates = sorted({trial.learning_rate for trial in found})
        assert best_point(found)[0] in rates[1:-1], method


@pytest.mark.parametrize("suite", ["main", "flylora", "quickstart", "commonsense"])
def test_a_row_has_the_best_rate_of_its_method(suite: str) -> None:
    rates = {method: best_point(found)[0] for method, found in trials().items()}
    runs = [run for run in read_suite(suite).runs if run.method != "base"]
    assert {run.row or run.method: run.learning_rate for run in runs} == {
        run.row or run.method: rates[run.method] for run in runs
    }
