from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from furina.records import RecordError, RunRecord
from furina.reporting.compare.rows import findings
from furina.reporting.figures.dots import (
    PAPER_BELOW,
    difference_dots,
    setting_curves,
    varied_settings,
)
from furina.reporting.figures.plots import COLOURS, MARKERS, look, svg
from furina.reporting.read.paper import PaperTable
from tests.records import fakes
from tests.reporting.frames import load_suite

PAPER = Path(__file__).parents[2] / "results" / "paper" / "main.csv"
RATES = {"base": 0.4, "lora": 0.5, "furina": 0.62}
TASKS = ("arc_easy", "openbookqa")


def write(folder: Path, row: str, rate: float, seeds: int = 3, **adapter: Any) -> None:
    """Write a row's runs on both tasks; it is right one point more often with each seed."""
    for task in TASKS:
        for seed in range(1 if row == "base" else seeds):
            given = [i < round(100 * rate) + seed for i in range(100)]
            record = fakes.write_row(folder, row, task, given, seed)
            config = {**record.config, "adapter": {"rank": 16, **adapter}, "task": task}
            replace(record, config=config).write(folder / record.file_name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for row, rate in RATES.items():
        write(tmp_path, row, rate)
    return tmp_path


def drawn(folder: Path, paper: bool = True) -> Axes:
    figure = difference_dots(load_suite(folder), PaperTable.read(PAPER) if paper else None)
    assert figure
    (axes,) = figure.axes
    return axes


def points(axes: Axes, marker: str, hollow: bool | None = None) -> list[tuple[float, float]]:
    """Return the points that are drawn with a marker."""
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_marker() == marker and hollow in (None, line.get_markerfacecolor() == "none")
        for x, y in zip(np.ravel(line.get_xdata()), np.ravel(line.get_ydata()), strict=True)
    ]


def test_every_seed_on_every_task_is_a_dot_at_its_difference(folder: Path) -> None:
    axes = drawn(folder)
    for i in range(len(TASKS)):
        dots = points(axes, look(i)[1])
        by_row = [sorted(x for x, y in dots if round(y) == height) for height in range(3)]
        assert by_row[0] == pytest.approx([-11.0])  # base: 40 against a mean of 51
        assert by_row[1] == pytest.approx([-1.0, 0.0, 1.0])
        assert by_row[2] == pytest.approx([11.0, 12.0, 13.0])


def test_tasks_and_rows_do_not_lie_on_each_other(folder: Path) -> None:
    axes = drawn(folder)
    levels = [{round(y, 6) for _, y in points(axes, look(i)[1])} for i in range(len(TASKS))]
    assert not levels[0] & levels[1]
    assert all(abs(y - round(y)) < PAPER_BELOW for level in levels for y in level)


def test_the_mean_has_its_interval_and_the_reference_has_none(folder: Path) -> None:
    axes = drawn(folder)
    found = findings(load_suite(folder), "lora")
    means = {y: x for x, y in points(axes, "|")}
    assert means == pytest.approx({0.0: found["base"].difference, 2.0: found["furina"].difference})
    comparison = found["furina"].comparison
    assert comparison
    bars = [
        np.ravel(line.get_xdata()).tolist()
        for line in axes.lines
        if line.get_marker() == "None" and np.ravel(line.get_ydata()).tolist() == [2, 2]
    ]
    assert bars == [[comparison.low, comparison.high]]


def test_the_papers_differences_are_hollow_and_of_unrun_rows_too(folder: Path) -> None:
    axes = drawn(folder)
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels[:3] == ["base", "lora", "furina"]
    assert labels[3:] == [
        f"{row} (not run)"
        for row in ("dora", "mixlora", "loramoe", "mola", "slim", "furina-no-shared")
    ]
    found = sorted(points(axes, "d", hollow=True), key=lambda point: point[1])
    marks = dict(zip(labels[2:], found, strict=True))
    assert marks["furina"] == pytest.approx((83.6 - 78.8, 2 + PAPER_BELOW))
    assert marks["dora (not run)"][0] == pytest.approx(77.1 - 78.8)


def test_without_the_papers_table_only_our_rows_are_drawn(folder: Path) -> None:
    axes = drawn(folder, paper=False)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["base", "lora", "furina"]
    assert points(axes, "d", hollow=True) == []


def test_the_first_row_is_at_the_top_and_zero_is_the_reference(folder: Path) -> None:
    axes = drawn(folder)
    bottom, top = axes.get_ylim()
    assert bottom > top
    assert axes.get_xlabel() == "difference to lora, points (acc)"
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for shown in figure.legends for text in shown.get_texts()]


def test_the_legend_names_tasks_mean_and_paper(folder: Path) -> None:
    suite = load_suite(folder)
    figure = difference_dots(suite, PaperTable.read(PAPER))
    plain = difference_dots(suite)
    assert figure and plain
    ours = [*TASKS, "mean of tasks, 95 % interval"]
    assert legend(figure) == [*ours, "the paper's difference"]
    assert legend(plain) == ours


def test_nothing_is_drawn_where_nothing_compares(tmp_path: Path) -> None:
    write(tmp_path, "furina", 0.5)
    assert difference_dots(load_suite(tmp_path)) is None


def test_an_unknown_reference_is_an_error(folder: Path) -> None:
    with pytest.raises(RecordError, match="has no row 'dora'"):
        difference_dots(load_suite(folder), reference="dora")


def test_series_differ_in_shape_as_well_as_in_colour() -> None:
    looks = [look(i) for i in range(len(COLOURS) * len(MARKERS))]
    assert len(set(looks)) == len(looks)
    assert len({marker for _, marker in looks[: len(COLOURS)]}) == len(COLOURS)


DRAW = """
import sys
from pathlib import Path
from furina.reporting.figures import dots, plots
from furina.reporting.read.suites import load_suites
suite = load_suites(Path(sys.argv[1]))[0]
for figure in (dots.difference_dots(suite), dots.setting_curves(suite)):
    sys.stdout.write(plots.svg(figure))
"""


@pytest.fixture
def varied(tmp_path: Path) -> Path:
    """A suite that varies two settings, with the base model beside it."""
    write(tmp_path, "base", 0.4)
    for value in (0.0, 0.01, 1.0):
        write(tmp_path, f"alpha-{value:g}", 0.6 - value / 10, selection_coefficient=value)
    for count in (4, 0, 1, 16):
        write(tmp_path, f"shared-{count}", 0.5 + count / 100, num_shared_experts=count)
    return tmp_path


def test_the_figures_are_the_same_bytes_in_every_process(varied: Path) -> None:
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", DRAW, str(varied)]
        run = subprocess.run(command, env=environment, capture_output=True, check=True)
        outputs.add(run.stdout)
    assert len(outputs) == 1


def test_each_varied_setting_is_a_curve_in_the_order_of_its_values(varied: Path) -> None:
    found = {name: list(rows.items()) for name, rows in varied_settings(load_suite(varied)).items()}
    assert found == {
        "adapter.num_shared_experts": [
            (0.0, "shared-0"),
            (1.0, "shared-1"),
            (4.0, "shared-4"),
            (16.0, "shared-16"),
        ],
        "adapter.selection_coefficient": [(0.0, "alpha-0"), (0.01, "alpha-0.01"), (1.0, "alpha-1")],
    }


def test_a_row_that_differs_in_something_else_is_on_no_curve(varied: Path) -> None:
    write(varied, "alpha-2", 0.5, selection_coefficient=2.0, rank=8)
    found = varied_settings(load_suite(varied))
    assert list(found["adapter.selection_coefficient"]) == [0.0, 0.01, 1.0]


def test_two_values_or_words_are_no_curve(folder: Path) -> None:
    for i in range(2):
        write(folder, f"rank-{i}", 0.5, rank=8 * (i + 1))
    for i in range(4):
        write(folder, f"word-{i}", 0.5, activity=f"kind {i}")
    for i in range(2):
        write(folder, f"switch-{i}", 0.5, detach_norm=bool(i))
    assert varied_settings(load_suite(folder)) == {}
    assert setting_curves(load_suite(folder)) is None


def test_a_curve_has_a_dot_per_seed_a_line_through_the_means_and_the_base_model(
    varied: Path,
) -> None:
    figure = setting_curves(load_suite(varied))
    assert figure
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "num shared experts",
        "selection coefficient",
    ]
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "4", "16"]
    for i in range(len(TASKS)):
        dots = points(axes, look(i)[1])
        assert sorted(dots) == [
            (x, pytest.approx(50.0 + count + seed))
            for x, count in enumerate((0, 1, 4, 16))
            for seed in range(3)
        ]
    lines = [np.ravel(line.get_ydata()).tolist() for line in axes.lines]
    assert lines.count(pytest.approx([51.0, 52.0, 55.0, 67.0])) == len(TASKS)
    assert lines.count([40.0, 40.0]) == len(TASKS)
    assert legend(figure) == list(TASKS)


def test_a_run_that_failed_leaves_a_gap(varied: Path) -> None:
    for task in TASKS:
        for seed in range(3):
            path = varied / f"shared-4--{task}--seed{seed}.json"
            record = RunRecord.read(path)
            replace(record, status="failed", evaluations=(), error="killed").write(path)
    figure = setting_curves(load_suite(varied))
    assert figure
    assert {x for x, _ in points(figure.axes[0], look(0)[1])} == {0.0, 1.0, 3.0}


def test_the_figures_are_svg(varied: Path) -> None:
    suite = load_suite(varied)
    for figure in (difference_dots(suite), setting_curves(suite)):
        assert figure
        assert svg(figure).startswith("<?xml")
