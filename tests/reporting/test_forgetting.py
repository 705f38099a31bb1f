from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RunRecord
from furina.reporting.compare.forgetting import general_tasks
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.suites import load_suites
from furina.reporting.tables import notes
from furina.reporting.tables.cells import Cell
from furina.reporting.tables.comparison import comparison_table
from furina.reporting.tables.forgetting import AT_CHANCE, DROP, NOTHING_TO_LOSE, forgetting_table
from furina.reporting.tables.scores import NO_BASE_SCORE
from tests.records import fakes
from tests.reporting.frames import load_suite, rows_of

PAPER = Path(__file__).parents[2] / "results" / "paper" / "forgetting.csv"
BASE = {"openbookqa": 0.3, "mmlu": 0.5, "gsm8k": 0.4}
TUNED = {
    "lora": {"openbookqa": 0.6, "mmlu": 0.4, "gsm8k": 0.2},
    "furina": {"openbookqa": 0.6, "mmlu": 0.45, "gsm8k": 0.44},
}
MMLU, GSM8K, MEAN = ("mmlu, text", DROP), ("gsm8k, text", DROP), ("mean of 2 tasks", DROP)


def write(folder: Path, row: str, rates: dict[str, float], seed: int = 0) -> None:
    """Write one run: trained on openbookqa, unless it is the base model, and scored on all."""
    parts = [
        fakes.write_row(folder, row, task, [i < round(200 * rate) for i in range(200)], seed)
        for task, rate in rates.items()
    ]
    for part in parts:
        (folder / part.file_name).unlink()
    data = [part.data[0] for part in parts]
    untrained = [replace(d, train_sha256=None, validation_sha256=None) for d in data]
    whole = replace(
        parts[0],
        task="openbookqa",
        data=(*(untrained[:1] if row == "base" else data[:1]), *untrained[1:]),
        training=None if row == "base" else parts[0].training,
        evaluations=tuple(score for part in parts for score in part.evaluations),
    )
    whole.write(folder / whole.file_name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "base", BASE)
    for seed in range(3):
        for row, rates in TUNED.items():
            write(tmp_path, row, {t: rate + 0.01 * (seed - 1) for t, rate in rates.items()}, seed)
    return tmp_path


def lines(folder: Path, paper: bool = False) -> dict[str, dict[tuple[str, str], Cell]]:
    table = forgetting_table(load_suites(folder)[0], PaperTable.read(PAPER) if paper else None)
    assert table
    return {row["", "row"].text: row for row in rows_of(table)}


def test_a_drop_is_relative_to_the_base_model_and_a_mean_over_seeds(folder: Path) -> None:
    shown = lines(folder)["lora"][MMLU]
    drops = [100 * (0.5 - (0.4 + 0.01 * (seed - 1))) / 0.5 for seed in range(3)]
    assert shown.numbers[""] == pytest.approx(20.0) == pytest.approx(statistics.fmean(drops))
    assert shown.numbers["sd over seeds"] == pytest.approx(statistics.stdev(drops))
    assert shown.text == "20.0 ± 2.0"


def test_a_gain_is_a_drop_below_zero(folder: Path) -> None:
    assert lines(folder)["furina"][GSM8K].text == "-10.0 ± 2.5"


def test_the_mean_drop_counts_tasks_alike(folder: Path) -> None:
    rows = lines(folder)
    assert rows["lora"][MEAN].numbers[""] == pytest.approx((20 + 50) / 2)
    assert rows["furina"][MEAN].numbers[""] == pytest.approx((10 - 10) / 2)
    assert rows["lora"][MEAN].numbers["sd over seeds"] == pytest.approx((2.0 + 2.5) / 2)
    assert rows["base"][MEAN].notes == rows["base"][MMLU].notes == (notes.REFERENCE,)


def test_only_tasks_that_no_run_trained_are_general(folder: Path) -> None:
    suite = load_suite(folder)
    assert [general.task for general in general_tasks(suite)] == ["gsm8k", "mmlu"]
    assert ("openbookqa, text", DROP) not in lines(folder)["lora"]


def test_the_comparison_leaves_them_out_and_says_so(folder: Path) -> None:
    suite = load_suite(folder).without_general_tasks()
    assert (suite.tasks, suite.left_out) == (["openbookqa"], {"gsm8k", "mmlu"})
    table = comparison_table(suite)
    assert table
    assert any("not" in remark.lower() and "gsm8k, mmlu" in remark for remark in table.remarks)
    assert rows_of(table)[1]["acc, %", "openbookqa"].numbers["seeds"] == 3
    assert not [key for key in rows_of(table)[1] if "mean of" in key[1]]


def test_a_suite_without_training_keeps_all_its_tasks(tmp_path: Path) -> None:
    write(tmp_path, "base", BASE)
    suite = load_suite(tmp_path)
    assert suite.without_general_tasks().tasks == suite.tasks == ["gsm8k", "mmlu", "openbookqa"]


def test_a_suite_that_scores_what_it_trained_has_no_such_table(seeded: Path) -> None:
    assert forgetting_table(load_suite(seeded)) is None


def test_tasks_of_other_protocols_count_too(folder: Path) -> None:
    for path in folder.glob("*.json"):
        record = RunRecord.read(path)
        scores = [
            replace(score, protocol="cot", metric="exact", samples=None)
            if score.task == "gsm8k"
            else score
            for score in record.evaluations
        ]
        replace(record, evaluations=tuple(scores)).write(path)
    assert len(load_suites(folder)) == 2
    row = lines(folder)["lora"]
    assert row["gsm8k, cot", "exact, %"].text == "20.0 ± 1.0"
    assert row["gsm8k, cot", DROP].numbers[""] == pytest.approx(50.0)
    assert row[MEAN].numbers[""] == pytest.approx(35.0)


def test_the_papers_mean_drops_stand_beside_ours(folder: Path) -> None:
    rows = lines(folder, paper=True)
    column = "in the paper: relative drop", "%"
    assert (rows["lora"][column].text, rows["furina"][column].text) == ("10.1", "2.0")
    assert rows["lora"]["ours − paper", "%"].text == "+24.9"
    assert rows["furina-rslora"]["", "model"].text == "not run"
    assert rows["furina-rslora"][column].text == "3.7"
    assert rows["furina-rslora"][MEAN].notes == (notes.NOT_RUN,)


def test_a_base_model_at_chance_is_marked(folder: Path) -> None:
    write(folder, "base", {**BASE, "mmlu": 0.28})
    rows = lines(folder)
    assert rows["lora"][MMLU].notes == rows["lora"][MEAN].notes == (AT_CHANCE,)
    assert rows["lora"][GSM8K].notes == ()


def test_a_base_model_that_answers_nothing_leaves_nothing_to_lose(folder: Path) -> None:
    write(folder, "base", {**BASE, "gsm8k": 0.0})
    row = lines(folder)["lora"]
    assert (row[GSM8K].text, row[GSM8K].notes) == ("–", (NOTHING_TO_LOSE,))
    assert (row[MEAN].text, row[MEAN].notes) == ("–", (notes.NOT_ALL_TASKS,))


def test_without_a_base_model_there_is_no_drop(folder: Path) -> None:
    for path in folder.glob("base--*.json"):
        path.unlink()
    assert lines(folder)["lora"][MMLU].notes == (NO_BASE_SCORE,)


def test_a_run_that_diverged_is_left_out_and_said_so(folder: Path) -> None:
    path = folder / "lora--openbookqa--seed1.json"
    record = replace(RunRecord.read(path), status="diverged", evaluations=())
    record.write(path)
    note = "without 1 of 3 runs, which diverged or failed, see below"
    assert lines(folder)["lora"][MMLU].notes == (notes.TWO_SEEDS, note)
    for seed in (0, 2):
        path = folder / f"lora--openbookqa--seed{seed}.json"
        replace(RunRecord.read(path), status="diverged", evaluations=()).write(path)
    assert lines(folder)["lora"][MMLU].notes == (notes.NO_RESULT,)
