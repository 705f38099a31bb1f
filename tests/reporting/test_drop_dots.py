from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RunRecord
from furina.reporting.figures.dots import PAPER_BELOW, drop_dots, training_costs
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.suites import load_suites
from tests.records import fakes
from tests.reporting.frames import load_suite

PAPER = Path(__file__).parents[2] / "results" / "paper" / "forgetting.csv"


def points(figure, marker: str) -> list[tuple[float, float]]:
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_marker() == marker]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def forgetful(folder: Path) -> Path:
    """Two rows that were trained on openbookqa and are scored on two other tasks as well."""
    rates = {
        "base": {"openbookqa": 0.3, "mmlu": 0.5, "gsm8k": 0.4},
        "lora": {"openbookqa": 0.6, "mmlu": 0.4, "gsm8k": 0.2},
        "furina": {"openbookqa": 0.6, "mmlu": 0.45, "gsm8k": 0.44},
    }
    for row, found in rates.items():
        parts = [
            fakes.write_row(folder, row, task, [i < round(200 * rate) for i in range(200)])
            for task, rate in found.items()
        ]
        untrained = [
            replace(part.data[0], train_sha256=None, validation_sha256=None) for part in parts
        ]
        for part in parts:
            (folder / part.file_name).unlink()
        first = untrained[0] if row == "base" else parts[0].data[0]
        scores = tuple(score for part in parts for score in part.evaluations)
        whole = replace(parts[0], data=(first, *untrained[1:]), evaluations=scores)
        whole.write(folder / whole.file_name)
    return folder


def test_every_drop_is_a_dot_beside_the_mean_and_the_papers(tmp_path: Path) -> None:
    suite = load_suites(forgetful(tmp_path / "forgetting"))[0]
    figure = drop_dots(suite, PaperTable.read(PAPER))
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lora", "furina"]
    drops = {"lora": [50.0, 20.0], "furina": [-10.0, 10.0]}  # gsm8k, mmlu
    for place, marker in enumerate(("o", "s")):
        found = points(figure, marker)
        assert [x for x, _ in found] == pytest.approx([each[place] for each in drops.values()])
        assert [round(y) for _, y in found] == [0, 1]
    assert points(figure, "|") == [(pytest.approx(35.0), 0), (pytest.approx(0.0), 1)]
    assert points(figure, "d") == [(10.1, PAPER_BELOW), (2.0, 1 + PAPER_BELOW)]
    without = drop_dots(suite)
    assert without is not None and points(without, "d") == []


def test_where_nothing_else_is_scored_nothing_is_drawn(folder: Path) -> None:
    assert drop_dots(load_suite(folder)) is None


def test_a_suite_about_cost_shows_what_a_step_takes(tmp_path: Path) -> None:
    folder = tmp_path / "training_cost-cpu"
    for row, seconds in (("base", 0.0), ("lora", 16.0), ("furina", 24.0)):
        file = folder / fakes.write_row(folder, row, "arc_easy", [True, False] * 50).file_name
        record = RunRecord.read(file)
        if record.training:
            spent = replace(record.training, steps=8, seconds=seconds, peak_memory_bytes=3 * 10**9)
            replace(record, training=spent).write(file)
    figure = training_costs(load_suite(folder))
    assert figure is not None
    steps, memory = figure.axes
    assert [label.get_text() for label in steps.get_yticklabels()] == ["lora", "furina"]
    assert [bar.get_width() for bar in steps.patches] == [2.0, 3.0]
    assert [bar.get_width() for bar in memory.patches] == [3.0, 3.0]
    assert training_costs(replace(load_suite(folder), name="main-cpu")) is None
