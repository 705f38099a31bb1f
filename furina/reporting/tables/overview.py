"""The table of a README: what each row reaches and costs, in as few columns as a page holds.

It is made of the main table's cells; that one has the rest.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from furina.reporting.read.scores import served
from furina.reporting.read.suites import Results
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing
from furina.reporting.tables.main import (
    VARIANTS,
    conditions,
    failure_remarks,
    latency_remark,
    main_row,
    task_remark,
)
from furina.reporting.tables.scores import gain_cell

WIDEST = 8
"""Columns that a page holds."""
USUAL = "lora"
"""The row whose training time the others' is compared with."""
NO_USUAL = f"there is no trained row {USUAL} to compare with"
UNMERGED = "does not merge: its accuracy is the unmerged model's"
ACCURACY = (
    "Accuracy: of the merged model, mean over seeds ± one standard error over the questions; in "
    "brackets its gain over base in points, paired over questions, ± the gain's standard error."
)
TRAINING = f"Training: time without evaluation; × is the ratio to {USUAL}'s."


def overview_table(suite: Results) -> Table:
    """Return a line per row: accuracy and gain by task, times over base's, training over LoRA's.

    Where the tasks would make it wider than WIDEST columns, their mean stands for them.
    """
    main = {row: main_row(suite, row) for row in suite.rows}
    tasks = suite.tasks
    rows = [_line(suite, row, main, {task: [task] for task in tasks}) for row in main]
    if len(rows[0]) > WIDEST:
        mean = {f"mean of {len(tasks)} tasks": tasks}
        rows, tasks = [_line(suite, row, main, mean) for row in main], []
    asked = [remark for task in tasks if (remark := task_remark(suite, task))]
    remarks = [ACCURACY, *asked, *latency_remark(suite), TRAINING, conditions(suite)]
    remarks += [f"Computed in {suite.dtype}.", *failure_remarks(suite)]
    return build("overview", f"{suite.name}: at a glance", rows, tuple(remarks))


def _line(
    suite: Results, row: str, main: dict[str, Row], columns: Mapping[str, Sequence[str]]
) -> Row:
    """Return a row's cells; `columns` has the tasks of each column of accuracies."""
    own, variant = main[row], served(suite, row)
    notes = list(own["", "method"].notes)
    if row != "base" and suite.select(row):
        notes += [*own["", "seeds"].notes, *[UNMERGED] * (variant == "unmerged")]
    cells: Row = {("", "method"): label(row, *notes), ("", "trainable"): own["", "trainable"]}
    for name, tasks in columns.items():
        unit = f"{suite.metric}, %" if name in suite.tasks else "%"
        group = f"{name} {unit}" if name in suite.tasks else f"{name}, {unit}"
        gains = [gain_cell(suite, row, task, variant) for task in tasks] if row != "base" else []
        cells[name, unit] = _accuracy_cell(own[group, variant], gains)
    for timed in VARIANTS:
        time = own["time per token, ms", timed]
        cells["time per token", timed] = _ratio(_number(time, "ratio to base"), time)
    cells["", "training time"] = _training_cell(row, main)
    return cells


def _accuracy_cell(accuracy: Cell, gains: Sequence[Cell]) -> Cell:
    """Return an accuracy with the mean of its gains over base, where all of them are known."""
    value, error = _number(accuracy), _number(accuracy, "stderr")
    if value is None:
        return accuracy
    text, numbers = f"{value:.1f} ± {error:.1f}", dict(accuracy.numbers)
    points = [found for gain in gains if (found := _number(gain)) is not None]
    errors = [found for gain in gains if (found := _number(gain, "stderr")) is not None]
    if gains and len(points) == len(errors) == len(gains):
        gain, error = statistics.fmean(points), math.hypot(*errors) / len(errors)
        text += f" ({gain:+.1f} ± {error:.1f})"
        numbers |= {"gain": gain, "gain's stderr": error}
    notes = (*accuracy.notes, *(note for gain in gains for note in gain.notes))
    return Cell(text, numbers, notes)


def _training_cell(row: str, main: dict[str, Row]) -> Cell:
    own = main[row]["training", "minutes"]
    usual = main[USUAL]["training", "minutes"] if USUAL in main else missing(NO_USUAL)
    mine, theirs = _number(own), _number(usual)
    if mine is None or not theirs:
        return missing(*(own if mine is None else usual).notes)
    return _ratio(mine / theirs, own, usual)


def _ratio(value: float | None, *of: Cell) -> Cell:
    """Return a ratio with the notes of the cells that it is of."""
    notes = [note for cell in of for note in cell.notes]
    return missing(*notes) if value is None else Cell(f"{value:.2f}×", {"": value}, notes)


def _number(cell: Cell, name: str = "") -> float | None:
    value = cell.numbers.get(name)
    return value if isinstance(value, float) else None
