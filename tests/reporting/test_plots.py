from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from furina.records import RunRecord
from furina.reporting.figures import plots
from furina.reporting.figures.scores import accuracy_latency, loss_curves
from tests.records import fakes
from tests.reporting.frames import load_suite

DRAW = """
import sys
from pathlib import Path
from furina.reporting.figures import plots
from furina.reporting.figures.scores import accuracy_latency, loss_curves
from furina.reporting.read.suites import load_suites
suite = load_suites(Path(sys.argv[1]))[0]
for figure in (accuracy_latency(suite), loss_curves(suite)):
    sys.stdout.write(plots.svg(figure))
"""


def test_an_svg_is_the_same_bytes_in_every_process(folder: Path) -> None:
    drawn = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", DRAW, str(folder)]
        run = subprocess.run(command, env=environment, capture_output=True, check=True)
        drawn.add(run.stdout)
    assert len(drawn) == 1


def test_an_svg_does_not_depend_on_the_users_style(folder: Path) -> None:
    suite = load_suite(folder)
    figure = loss_curves(suite)
    assert figure
    plain = plots.svg(figure)
    with mpl.rc_context({"font.size": 20, "axes.grid": False, "svg.hashsalt": "other"}):
        again = loss_curves(suite)
        assert again
        assert plots.svg(again) == plain
        assert mpl.rcParams["font.size"] == 20


def test_an_svg_is_xml_without_a_date(folder: Path) -> None:
    figure = accuracy_latency(load_suite(folder))
    assert figure
    text = plots.svg(figure)
    assert ET.fromstring(text).tag.endswith("svg")
    assert "<dc:date>" not in text


def test_each_task_has_a_panel_with_every_method_unmerged_and_merged(folder: Path) -> None:
    suite = load_suite(folder)
    figure = accuracy_latency(suite)
    assert figure
    assert [axes.get_title() for axes in figure.axes] == suite.tasks
    for task, axes in zip(suite.tasks, figure.axes, strict=True):
        shown = {
            (float(line.get_xdata()[0]), float(line.get_ydata()[0]))  # type: ignore[index, arg-type]
            for line in axes.lines
            if line.get_marker() not in ("None", "", None)
        }
        for method in ("lora", "furina"):
            run = suite.select(method, task)[0]
            for variant in ("unmerged", "merged"):
                score = run.score(variant, task, "text", "acc")
                assert score
                assert any(y == pytest.approx(100 * score.value) for _, y in shown)


def test_a_missing_cell_leaves_the_other_points(folder: Path) -> None:
    (folder / "lora--openbookqa--seed0.json").unlink()
    figure = accuracy_latency(load_suite(folder))
    assert figure
    markers = [sum(line.get_marker() in ("o", "s", "*") for line in a.lines) for a in figure.axes]
    assert markers == [5, 3]


def names_in_legend(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def test_loss_curves_show_every_trained_run_and_name_each_method_once(seeded: Path) -> None:
    figure = loss_curves(load_suite(seeded))
    assert figure
    assert names_in_legend(figure) == ["lora", "furina, auxiliary loss included"]
    for axes in figure.axes:
        lines = [line for line in axes.lines if isinstance(line, Line2D)]
        assert len(lines) == 2 * 2 * 3


def test_no_two_loss_curves_look_alike(tmp_path: Path) -> None:
    record = fakes.run_record("lora", "arc_easy")
    for row in "abcdefghi":
        fakes.write_run(tmp_path, replace(record, config={**record.config, "row": row}))
    figure = loss_curves(load_suite(tmp_path))
    assert figure
    thick = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_linestyle()) for line in thick}) == 9


def test_an_auxiliary_loss_is_no_part_of_the_task_loss(folder: Path) -> None:
    for path in folder.glob("furina--*.json"):
        record = RunRecord.read(path)
        steps = [step for step, _ in record.training.loss_curve]
        added = tuple((step, 3.0 + step) for step in steps)
        total = tuple((step, 1.5 + auxiliary) for step, auxiliary in added)
        training = replace(record.training, loss_curve=total, auxiliary_curve=added)
        replace(record, training=training).write(path)
    figure = loss_curves(load_suite(folder))
    assert figure
    assert names_in_legend(figure) == ["lora", "furina"]
    for axes in figure.axes:
        (line,) = [line for line in axes.lines if line.get_label() == "furina"]
        assert set(line.get_ydata()) == {1.5}


def test_a_diverged_run_keeps_its_curve(folder: Path) -> None:
    record = replace(fakes.run_record("lora", "arc_easy"), status="diverged", evaluations=())
    fakes.write_run(folder, record)
    figure = loss_curves(load_suite(folder))
    assert figure
    assert len(figure.axes[0].lines) == 4


def test_there_is_no_figure_without_numbers(folder: Path) -> None:
    for path in folder.glob("*.json"):
        replace(RunRecord.read(path), latency=(), training=None).write(path)
    suite = load_suite(folder)
    assert accuracy_latency(suite) is None
    assert loss_curves(suite) is None


def test_more_methods_than_colours_are_all_shown_and_no_two_alike(folder: Path) -> None:
    for i in range(len(plots.COLOURS)):
        record = replace(fakes.run_record("lora", "arc_easy"), method=f"method{i}")
        record.write(folder / record.file_name)
    figure = accuracy_latency(load_suite(folder))
    assert figure
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    looks = {(h.get_color(), h.get_marker()) for h in figure.legends[0].get_lines()[:-2]}
    assert labels[:-2] == load_suite(folder).rows
    assert len(looks) == 1 + 2 + len(plots.COLOURS)
