from __future__ import annotations

import random
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RecordError, RunRecord
from furina.reporting.compare.rows import comparisons, findings, reference_row, signed_rank
from furina.reporting.read.paper import PaperTable
from furina.reporting.read.scores import macro
from furina.reporting.read.statistics import holm
from furina.reporting.tables import notes, render
from furina.reporting.tables.cells import Cell, Table
from furina.reporting.tables.comparison import FEW_PAIRS, NOT_PAIRED, comparison_table
from furina.reporting.tables.paper import NOT_IN_PAPER, UNKNOWN
from tests.records import fakes
from tests.reporting.frames import load_suite, rows_of

PAPER = Path(__file__).parents[2] / "results" / "paper"
TASKS = ("arc_easy", "openbookqa")
RATES = {"base": 0.4, "lora": 0.5, "furina": 0.62, "furina-no-shared": 0.48}
MEAN = "acc, %", "mean of 2 tasks"
OURS = "difference to lora, points", "ours"
P = "difference to lora, points", "p"
SIGNED = "difference to lora, points", "Wilcoxon's p"
THEIRS = "in the paper: mean of 3", "%"
THEIR_DIFFERENCE = "in the paper: mean of 3", "difference to lora"
MINUS = "ours − paper", "%"
MINUS_DIFFERENCE = "ours − paper", "difference to lora"


def answers(rate: float, seed: str, n: int = 300) -> list[bool]:
    right = [i < round(rate * n) for i in range(n)]
    random.Random(seed).shuffle(right)
    return right


def rate_of(row: str, task: str, seed: int) -> float:
    return RATES[row] + 0.02 * (seed - 1) + (0.1 if task == "arc_easy" else 0.0)


def write(folder: Path, seeds: int = 3, rows: tuple[str, ...] = tuple(RATES)) -> Path:
    for row in rows:
        for task in TASKS:
            for seed in range(1 if row == "base" else seeds):
                given = answers(rate_of(row, task, seed), f"{row} {task} {seed}")
                fakes.write_row(folder, row, task, given, seed)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "main-cpu")


def paper(name: str = "main") -> PaperTable:
    return PaperTable.read(PAPER / f"{name}.csv")


def made(folder: Path, name: str | None = "main") -> Table:
    table = comparison_table(load_suite(folder), paper(name) if name else None)
    assert table
    return table


def lines(table: Table) -> dict[str, dict[tuple[str, str], Cell]]:
    return {row["", "row"].text: row for row in rows_of(table)}


def edit(folder: Path, name: str, **changes: object) -> RunRecord:
    path = folder / f"{name}.json"
    record = replace(RunRecord.read(path), **changes)  # type: ignore[arg-type]
    record.write(path)
    return record


def test_a_cell_is_the_mean_over_seeds_with_their_deviation_and_number(folder: Path) -> None:
    row = lines(made(folder))["furina"]
    seeds = [100 * rate_of("furina", "arc_easy", seed) for seed in range(3)]
    shown = row["acc, %", "arc_easy"]
    assert shown.numbers[""] == pytest.approx(statistics.fmean(seeds))
    assert shown.numbers["sd over seeds"] == pytest.approx(statistics.stdev(seeds))
    assert shown.numbers["seeds"] == 3
    assert shown.text == "72.0 ± 2.0"
    assert row["", "seeds"].text == "3"
    assert row["acc, %", "arc_easy"].notes == ()


def test_the_mean_counts_tasks_alike_and_its_deviation_is_of_the_seeds_means(folder: Path) -> None:
    shown = lines(made(folder))["furina"][MEAN]
    means = [
        100 * statistics.fmean(rate_of("furina", task, seed) for task in TASKS) for seed in range(3)
    ]
    assert shown.numbers[""] == pytest.approx(statistics.fmean(means))
    assert shown.numbers["sd over seeds"] == pytest.approx(statistics.stdev(means))


def test_each_row_says_which_model_stands_for_it(folder: Path) -> None:
    for task in TASKS:
        for seed in range(3):
            record = RunRecord.read(folder / f"furina--{task}--seed{seed}.json")
            kept = tuple(s for s in record.evaluations if s.variant == "unmerged")
            edit(folder, f"furina--{task}--seed{seed}", evaluations=kept)
    found = {row: cells["", "model"].text for row, cells in lines(made(folder, None)).items()}
    expected = {"base": "base", "lora": "merged", "furina": "unmerged"}
    assert found == {**expected, "furina-no-shared": "merged"}


def test_the_merged_score_is_shown_where_a_row_merges(folder: Path) -> None:
    record = RunRecord.read(folder / "furina--arc_easy--seed0.json")
    unmerged, merged = record.evaluations
    unmerged = replace(unmerged, value=0.0, samples=None)
    edit(folder, "furina--arc_easy--seed0", evaluations=(unmerged, merged))
    assert lines(made(folder))["furina"]["acc, %", "arc_easy"].text == "72.0 ± 2.0"


def test_differences_are_those_of_the_comparison_with_holms_p(folder: Path) -> None:
    suite = load_suite(folder)
    found = comparisons(suite, "lora")
    corrected = holm({row: comparison.p for row, comparison in found.items()})
    signed = {row: signed_rank(suite, row, "lora")[0] for row in found}
    signed_corrected = holm({row: p for row, p in signed.items() if p is not None})
    table = lines(made(folder))
    for row, comparison in found.items():
        numbers = table[row][OURS].numbers
        assert numbers[""] == pytest.approx(comparison.difference)
        assert (numbers["low"], numbers["high"]) == (comparison.low, comparison.high)
        assert table[row][P].numbers == {"": corrected[row], "uncorrected": comparison.p}
        assert table[row][SIGNED].numbers[""] == signed_corrected[row]
        assert table[row][SIGNED].numbers["pairs"] == 6
    assert corrected != {row: comparison.p for row, comparison in found.items()}
    assert {table["lora"][column].text for column in (OURS, P, SIGNED)} == {"–"}


def test_wilcoxons_p_needs_six_pairs(tmp_path: Path) -> None:
    row = lines(made(write(tmp_path, seeds=2)))["furina"]
    assert (row[SIGNED].text, row[SIGNED].notes) == ("–", (FEW_PAIRS,))
    assert row[P].text != "–"


def bold(table: Table) -> list[str]:
    return [row for row, cells in lines(table).items() if any(cell.bold for cell in cells.values())]


def test_the_best_row_is_bold_where_its_advantage_is_supported(folder: Path) -> None:
    table = made(folder)
    assert bold(table) == ["furina"]
    cells = lines(table)["furina"]
    assert [column for column, cell in cells.items() if cell.bold] == [MEAN]


def test_a_single_task_is_bold_itself(tmp_path: Path) -> None:
    write(tmp_path)
    for path in tmp_path.glob("*--openbookqa--*.json"):
        path.unlink()
    cells = lines(made(tmp_path))["furina"]
    assert MEAN not in cells
    assert [column for column, cell in cells.items() if cell.bold] == [("acc, %", "arc_easy")]


def test_nothing_is_bold_between_identical_rows(tmp_path: Path) -> None:
    for row in ("lora", "furina"):
        for task in TASKS:
            for seed in range(3):
                fakes.write_row(tmp_path, row, task, answers(0.5 + 0.02 * seed, task), seed)
    table = made(tmp_path)
    assert bold(table) == []
    assert lines(table)["furina"][P].numbers[""] == 1.0


def test_nothing_is_bold_where_the_reference_is_best(tmp_path: Path) -> None:
    write(tmp_path, rows=("base", "lora", "furina-no-shared"))
    table = made(tmp_path)
    assert bold(table) == []
    assert lines(table)["base"][P].numbers[""] < 0.05  # type: ignore[operator]


def test_nothing_is_bold_where_the_advantage_is_noise(tmp_path: Path) -> None:
    write(tmp_path, rows=("lora",))
    for task in TASKS:
        for seed in range(3):
            given = answers(rate_of("lora", task, seed) + 0.01, f"furina {task} {seed}")
            fakes.write_row(tmp_path, "furina", task, given, seed)
    table = made(tmp_path)
    assert lines(table)["furina"][OURS].numbers[""] == pytest.approx(1.0)
    assert lines(table)["furina"][P].numbers[""] > 0.05  # type: ignore[operator]
    assert bold(table) == []


def test_nothing_is_bold_from_one_seed_whatever_its_questions_say(tmp_path: Path) -> None:
    table = made(write(tmp_path, seeds=1))
    assert lines(table)["furina"][P].numbers[""] < 0.05  # type: ignore[operator]
    assert bold(table) == []


@pytest.mark.parametrize(
    ("single", "expected"), [("furina", []), ("lora", []), ("furina-no-shared", ["furina"])]
)
def test_both_rows_must_have_seeds_of_every_task(
    single: str, expected: list[str], folder: Path
) -> None:
    for seed in (1, 2):
        (folder / f"{single}--openbookqa--seed{seed}.json").unlink()
    table = made(folder)
    assert lines(table)["furina"][P].numbers[""] < 0.05  # type: ignore[operator]
    assert bold(table) == expected


def test_the_base_model_needs_no_seeds_as_a_reference(tmp_path: Path) -> None:
    rows = ("base", "furina-no-shared")
    assert bold(made(write(tmp_path, rows=rows), None)) == ["furina-no-shared"]


def test_only_the_best_of_the_supported_rows_is_bold(folder: Path) -> None:
    for task in TASKS:
        for seed in range(3):
            given = answers(rate_of("furina", task, seed) - 0.01, f"second {task} {seed}")
            fakes.write_row(folder, "second", task, given, seed)
    table = made(folder)
    assert lines(table)["second"][P].numbers[""] < 0.05  # type: ignore[operator]
    assert bold(table) == ["furina"]


@pytest.mark.parametrize("seeds, note", [(1, notes.ONE_SEED), (2, notes.TWO_SEEDS)])
def test_fewer_than_three_seeds_are_marked(seeds: int, note: str, tmp_path: Path) -> None:
    table = lines(made(write(tmp_path, seeds)))
    for column in (MEAN, ("acc, %", "arc_easy"), ("acc, %", "openbookqa")):
        assert note in table["furina"][column].notes
        assert note not in table["base"][column].notes


def test_a_score_at_chance_is_marked_in_its_cell_and_in_the_mean(folder: Path) -> None:
    given = answers(0.26, "at chance")
    fakes.write_row(folder, "furina", "openbookqa", given, 1)
    row = lines(made(folder))["furina"]
    assert "chance (25.0 %) in 1 of 3 seeds" in row["acc, %", "openbookqa"].notes[0]
    assert row[MEAN].notes == ("not above chance on openbookqa",)
    assert row["acc, %", "arc_easy"].notes == ()


def test_a_diverged_seed_is_left_out_and_said_so(folder: Path) -> None:
    name = "furina--openbookqa--seed2"
    edit(folder, name, status="diverged", error="not finite", evaluations=())
    table = made(folder)
    row = lines(table)["furina"]
    left_out = "without 1 of 3 runs, which diverged or failed, see below"
    for column in (MEAN, ("acc, %", "openbookqa")):
        assert row[column].notes == (notes.TWO_SEEDS, left_out)
    assert row["acc, %", "openbookqa"].numbers["seeds"] == 2
    assert row["", "seeds"].text == "2 to 3"
    assert "No result: furina on openbookqa, seed 2 diverged: not finite." in table.remarks
    assert row["acc, %", "arc_easy"].notes == lines(table)["lora"][MEAN].notes == ()


def test_a_row_that_failed_has_no_number_and_the_reason(folder: Path) -> None:
    for seed in range(3):
        name = f"furina--openbookqa--seed{seed}"
        record = edit(folder, name, status="failed", error="killed", evaluations=(), data=())
        edit(folder, name, backbone=replace(record.backbone, sha256=""))
    row = lines(made(folder))["furina"]
    shown = row["acc, %", "openbookqa"]
    assert (shown.text, shown.notes) == ("–", (notes.NO_RESULT,))
    assert (row[MEAN].text, row[MEAN].notes) == ("–", (notes.NOT_ALL_TASKS,))
    assert row[OURS].notes == row[MINUS].notes == (notes.NOT_ALL_TASKS,)
    assert row[THEIRS].text == "83.6"


def test_a_task_without_a_record_leaves_no_mean(folder: Path) -> None:
    for path in folder.glob("furina--openbookqa--*.json"):
        path.unlink()
    row = lines(made(folder))["furina"]
    assert row["acc, %", "openbookqa"].notes == (notes.NO_RECORD,)
    assert row[MEAN].text == row[P].text == "–"


def test_a_result_that_is_older_than_a_change_is_marked(folder: Path) -> None:
    (folder.parent / "numerics.csv").write_text(
        "date,area,what\n2026-11-21T00:00:00+00:00,training/furina,the norms are fused\n"
    )
    edit(folder, "furina--arc_easy--seed1", started="2026-11-22T00:00:00+00:00")
    table = lines(made(folder))
    stale = ("made before: the norms are fused",)
    assert table["furina"][MEAN].notes == table["furina"]["acc, %", "arc_easy"].notes == stale
    assert table["lora"][MEAN].notes == ()
    for seed in (0, 2):
        name = f"furina--arc_easy--seed{seed}"
        edit(folder, name, started="2026-11-22T00:00:00+00:00")
    table = lines(made(folder))
    assert table["furina"]["acc, %", "arc_easy"].notes == ()
    assert table["furina"]["acc, %", "openbookqa"].notes == stale


def test_without_per_question_outputs_there_is_a_difference_but_no_p(folder: Path) -> None:
    record = RunRecord.read(folder / "furina--arc_easy--seed0.json")
    (folder / str(record.evaluations[1].samples)).unlink()
    row = lines(made(folder))["furina"]
    assert (row[OURS].text, row[OURS].notes) == ("+12.0", (NOT_PAIRED,))
    assert (row[P].text, row[P].notes) == ("–", (NOT_PAIRED,))
    assert row[SIGNED].text != "–"
    assert bold(made(folder)) == []


def test_the_papers_numbers_stand_beside_ours_with_both_differences(folder: Path) -> None:
    row = lines(made(folder))["furina"]
    assert row[MEAN].numbers[""] == pytest.approx(67.0)
    assert (row[THEIRS].text, row[THEIR_DIFFERENCE].text) == ("83.6", "+4.8")
    assert (row[MINUS].text, row[MINUS_DIFFERENCE].text) == ("-16.6", "+7.2")
    lora = lines(made(folder))["lora"]
    assert (lora[THEIRS].text, lora[MINUS].text) == ("78.8", "-23.8")
    assert lora[THEIR_DIFFERENCE].notes == lora[MINUS_DIFFERENCE].notes == (notes.REFERENCE,)
    base = lines(made(folder))["base"]
    assert {base[column].notes for column in (THEIRS, THEIR_DIFFERENCE, MINUS)} == {(NOT_IN_PAPER,)}


def test_the_papers_column_is_that_of_our_backbone_where_there_is_one(folder: Path) -> None:
    for path in folder.glob("*.json"):
        backbone = replace(RunRecord.read(path).backbone, name="meta-llama/Llama-3.2-3B")
        edit(folder, path.stem, backbone=backbone)
    rows = lines(made(folder))
    group = "in the paper: Llama-3.2-3B"
    assert rows["furina"][group, "%"].text == "79.7"
    assert rows["furina"][group, "difference to lora"].text == "+2.3"
    assert rows["furina-no-shared"][group, "%"].notes == (UNKNOWN,)


def test_what_the_paper_has_and_we_have_not_is_listed_as_not_run(folder: Path) -> None:
    rows = lines(made(folder))
    absent = [row for row, cells in rows.items() if cells["", "model"].text == "not run"]
    assert absent == ["dora", "mixlora", "loramoe", "mola", "slim"]
    slim = rows["slim"]
    assert (slim[THEIRS].text, slim[THEIR_DIFFERENCE].text) == ("84.2", "+5.4")
    for column in (MEAN, ("acc, %", "arc_easy"), OURS, P, MINUS, MINUS_DIFFERENCE):
        assert (slim[column].text, slim[column].notes) == ("–", (notes.NOT_RUN,))


def test_a_row_of_the_paper_that_has_no_row_of_ours_keeps_its_name(folder: Path) -> None:
    for path in folder.glob("lora--*.json"):
        path.unlink()
    rows = lines(made(folder, "router_removed"))
    cells = rows["SLIM, merged without its router"]
    assert cells["", "model"].text == "not run"
    assert cells["in the paper: accuracy", "%"].text == "37.4"
    assert cells["in the paper: accuracy", "difference to base"].text == "-30.1"


def test_without_a_paper_table_there_are_no_columns_of_it(folder: Path) -> None:
    table = made(folder, None)
    assert not any("paper" in group for group, _ in table.frame.columns)
    assert [row["", "row"].text for row in rows_of(table)] == load_suite(folder).rows


def test_milliseconds_cannot_stand_beside_accuracies(folder: Path) -> None:
    with pytest.raises(RecordError, match="latency holds no percentages"):
        made(folder, "latency")


@pytest.mark.parametrize(
    ("rows", "name", "expected"),
    [
        (("base", "lora", "furina"), "main", "lora"),
        (("base", "furina"), "main", "furina"),
        (("base", "furina"), "router_removed", "base"),
        (("base", "lora", "furina"), "lora_variants", "furina"),
        (("base", "lora", "furina"), None, "lora"),
        (("base", "furina"), None, "furina"),
        (("base", "furina-no-shared"), None, "base"),
        (("furina-no-shared",), None, None),
    ],
)
def test_the_reference_is_lora_or_furina_or_base_or_a_row_that_the_paper_has_too(
    rows: tuple[str, ...], name: str | None, expected: str | None, tmp_path: Path
) -> None:
    suite = load_suite(write(tmp_path, seeds=1, rows=rows))
    assert reference_row(suite, paper(name) if name else None) == expected


def test_a_reference_can_be_chosen_and_must_be_there(folder: Path) -> None:
    suite = load_suite(folder)
    table = comparison_table(suite, paper(), reference="furina")
    assert table
    group = "difference to furina, points"
    assert lines(table)["lora"][group, "ours"].numbers[""] == pytest.approx(-12.0)
    with pytest.raises(RecordError, match=r"no row 'furna'\. Did you mean 'furina'"):
        comparison_table(suite, paper(), reference="furna")


def test_without_a_reference_there_are_no_differences(tmp_path: Path) -> None:
    write(tmp_path, rows=("furina-no-shared",))
    table = made(tmp_path, None)
    assert {group for group, _ in table.frame.columns} == {"", "acc, %"}


def test_nothing_compares_with_a_reference_that_lacks_a_task(folder: Path) -> None:
    for path in folder.glob("lora--openbookqa--*.json"):
        path.unlink()
    assert findings(load_suite(folder), "lora") == {}
    assert lines(made(folder))["furina"][OURS].notes == (notes.NOT_ALL_TASKS,)
    assert bold(made(folder)) == []


def test_there_is_no_table_where_nothing_was_scored(folder: Path) -> None:
    for path in folder.glob("*.json"):
        edit(folder, path.stem, evaluations=())
    assert comparison_table(load_suite(folder), paper()) is None


def test_the_table_is_the_same_text_every_time_and_in_every_form(folder: Path) -> None:
    first, second = made(folder), made(folder)
    for form in (render.markdown, render.csv, render.latex):
        assert form(first) == form(second)
    assert "**67.0 ± 2.0**" in render.markdown(first)
    assert r"\textbf{67.0 $\pm$ 2.0}" in render.latex(first)


def test_the_remarks_say_what_is_compared_and_on_what(folder: Path) -> None:
    text = " ".join(made(folder).remarks)
    for part in ("Holm", "95 %", "Table 1 of arXiv:2509.14900v2", "smollm2-135m-instruct", "n − 1"):
        assert part in text
    assert made(folder).title == (
        "main-cpu: under protocol text, compared with lora, beside the paper's Table 1"
    )


def test_a_mean_needs_every_task(folder: Path) -> None:
    suite = load_suite(folder)
    assert macro(suite, "furina") == pytest.approx(67.0)
    assert macro(suite, "no such row") is None
