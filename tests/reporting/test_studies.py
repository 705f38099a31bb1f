from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from furina.records import RecordError, SearchRecord, SelectionRecord
from furina.reporting.tables import studies
from furina.reporting.tables.cells import Cell, Table
from furina.reporting.tables.studies import best_point, search_table, selection_table
from tests.records.fakes import search_record, selection_record
from tests.reporting.frames import rows_of

T = TypeVar("T", SearchRecord, SelectionRecord)


def filed(records: Iterable[T]) -> dict[Path, T]:
    return {Path(f"{i}--{record.file_name}"): record for i, record in enumerate(records)}


GRID = [
    search_record("lora", "arc_easy", 2e-4, 0.61),
    search_record("lora", "openbookqa", 2e-4, 0.31),
    search_record("lora", "arc_easy", 5e-4, 0.66),
    search_record("lora", "openbookqa", 5e-4, 0.30),
    search_record("lora", "arc_easy", 1e-3, 0.70),
    search_record("lora", "openbookqa", 1e-3, None),
    search_record("furina", "arc_easy", 5e-4, 0.64, 1.0),
    search_record("furina", "openbookqa", 5e-4, 0.33, 1.0),
    search_record("furina", "arc_easy", 5e-4, 0.66, 20.0),
    search_record("furina", "openbookqa", 5e-4, 0.35, 20.0),
]
LORA = [record for record in GRID if record.method == "lora"]


def find(table: Table, column: tuple[str, str], **wanted: str) -> Cell:
    for row in rows_of(table):
        if all(row["", key].text == text for key, text in wanted.items()):
            found = row[column]
            assert isinstance(found, Cell)
            return found
    raise AssertionError(f"no row {wanted}")


def test_the_best_point_has_the_highest_mean_over_tasks() -> None:
    assert best_point(LORA) == (5e-4, None)


def test_a_point_that_diverged_on_one_task_does_not_compete() -> None:
    assert max(LORA, key=lambda record: record.value or 0).learning_rate == 1e-3
    assert best_point(LORA)[0] != 1e-3


def test_a_point_tried_on_one_task_only_does_not_compete() -> None:
    lonely = search_record("lora", "arc_easy", 2e-3, 0.99)
    assert best_point([*LORA, lonely]) == best_point(LORA)


def test_ties_go_to_the_lower_learning_rate() -> None:
    tied = [search_record("lora", "arc_easy", rate, 0.6) for rate in (1e-3, 2e-4, 5e-4)]
    assert best_point(tied) == (2e-4, None)


def test_the_magnitude_multiplier_is_part_of_the_point() -> None:
    assert best_point(r for r in GRID if r.method == "furina") == (5e-4, 20.0)


def test_nothing_can_be_chosen_where_every_point_diverged() -> None:
    with pytest.raises(RecordError, match="No searched point"):
        best_point([search_record("lora", "arc_easy", 1.0, None)])


def test_the_chosen_cell_of_each_block_is_marked_once() -> None:
    table = search_table(filed(GRID))
    stars = [
        (row["", "method"].text, row["", "magnitude"].text, column[1])
        for row in rows_of(table)
        for column, cell in row.items()
        if cell.bold
    ]
    assert stars == [("furina", "20×", "0.0005"), ("lora", "", "0.0005")]


def test_the_grid_shows_each_value_its_error_and_the_mean_over_tasks() -> None:
    table = search_table(filed(GRID))
    column = ("learning rate", "0.0002")
    assert find(table, column, method="lora", task="arc_easy").text == "61.0 ± 2.7"
    assert find(table, column, method="lora", task=studies.MEAN).text == "46.0"
    diverged = find(table, ("learning rate", "0.001"), method="lora", task="openbookqa")
    assert (diverged.text, diverged.notes) == ("–", (studies.DIVERGED,))
    untried = find(table, column, method="furina", task="arc_easy")
    assert (untried.text, untried.notes) == ("–", (studies.UNTRIED,))


def test_the_effort_of_the_search_is_counted() -> None:
    table = search_table(filed(GRID))
    assert any("furina 4, lora 6" in remark for remark in table.remarks)


def test_steps_and_forms_are_searched_apart() -> None:
    letters = [replace(record, protocol="label", value=0.9) for record in LORA]
    longer = [replace(record, steps=120) for record in LORA]
    table = search_table(filed([*LORA, *letters, *longer]))
    assert sum(cell.bold for cell in table.frame.to_numpy().ravel()) == 3


def test_one_trial_in_two_files_is_an_error_that_names_both() -> None:
    with pytest.raises(RecordError, match=r"0--lora.* and 1--lora.* hold the same trial"):
        search_table(filed([LORA[0], LORA[0]]))


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("the metric", {"metric": "acc_norm"}),
        ("the number of questions", {"n": 100}),
        ("the dtype", {"config": {"dtype": "float32"}}),
    ],
)
def test_another_metric_number_of_rows_or_dtype_in_one_grid_is_an_error(
    what: str, changes: dict[str, Any]
) -> None:
    other = replace(search_record("lora", "arc_easy", 1e-2, 0.5), **changes)
    with pytest.raises(RecordError, match=f"cannot share a table: {what} is"):
        search_table(filed([*LORA, other]))


OFF = [selection_record(seed, 0.0, share) for seed, share in enumerate((0.36, 0.37, 0.35))]
ON = [selection_record(seed, 0.01, share) for seed, share in enumerate((0.41, 0.43, 0.40))]


def test_on_minus_off_is_paired_by_seed() -> None:
    table = selection_table(filed([*OFF, *ON]))
    shown = find(table, ("top-K share, %", "on − off"), coefficient="0.01")
    differences = [
        100 * (on.top_k_share - off.top_k_share) for on, off in zip(ON, OFF, strict=True)
    ]
    stderr = statistics.stdev(differences) / 3**0.5
    assert shown.numbers[""] == pytest.approx(statistics.fmean(differences))
    assert shown.numbers["in stderr"] == pytest.approx(statistics.fmean(differences) / stderr)
    assert shown.notes == ()


def test_the_order_of_the_files_does_not_matter() -> None:
    first, second = (selection_table(filed(rs)) for rs in ([*OFF, *ON], [*reversed(ON), *OFF]))
    assert first.frame.equals(second.frame)


def test_other_seeds_are_compared_unpaired_and_said_so() -> None:
    table = selection_table(filed([*OFF, *(replace(run, seed=run.seed + 5) for run in ON)]))
    shown = find(table, ("top-K share, %", "on − off"), coefficient="0.01")
    assert shown.notes == (studies.OTHER_SEEDS,)
    assert shown.numbers["stderr"]


def test_one_seed_has_a_difference_without_a_standard_error() -> None:
    table = selection_table(filed([OFF[0], ON[0]]))
    shown = find(table, ("top-K share, %", "on − off"), coefficient="0.01")
    assert shown.text == "+5.00"
    assert shown.notes == (studies.ONE_SEED,)


def test_without_a_loss_off_run_there_is_no_difference() -> None:
    table = selection_table(filed(ON))
    shown = find(table, ("top-K share, %", "on − off"), coefficient="0.01")
    assert (shown.text, shown.notes) == ("–", (studies.NO_OFF,))


def test_the_reductions_have_rows_of_their_own_and_share_the_loss_off_runs() -> None:
    means = [replace(run, reduction="mean") for run in ON]
    table = selection_table(filed([*OFF, *ON, *means]))
    rows = [(r["", "reduction"].text, r["", "seeds"].text) for r in rows_of(table)]
    assert rows == [("off", "3"), ("mean", "3"), ("sum", "3")]


def test_a_loss_off_run_has_no_reduction_of_its_own() -> None:
    with pytest.raises(RecordError, match="hold the same trial"):
        selection_table(filed([OFF[0], replace(OFF[0], reduction="mean")]))


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("the number of active experts", {"top_k": 7}),
        ("the number of steps", {"steps": 7}),
        ("the dtype", {"config": {"dtype": "float32"}}),
    ],
)
def test_another_k_budget_or_dtype_in_one_study_is_an_error(
    what: str, changes: dict[str, Any]
) -> None:
    other = replace(selection_record(9, 0.01, 0.5), **changes)
    with pytest.raises(RecordError, match=f"cannot share a table: {what} is"):
        selection_table(filed([*OFF, *ON, other]))
