"""Two tables beside the main one: how exact each merge is, and the spread of the latencies."""

from __future__ import annotations

from furina.records import Spread
from furina.reporting.read.suites import Results, Run
from furina.reporting.tables.cells import Cell, Row, Table, build, decimals, label, number

NOT_COMPARED = "the two models' outputs were not compared"


def merge_table(suite: Results) -> Table | None:
    """Return a row per merged run, None where nothing was merged."""
    rows = [_merge_row(run) for row in suite.rows for run in suite.select(row) if run.record.merge]
    if not rows:
        return None
    remark = (
        "Update: largest entry, and norm relative to the weights'. Logits: merged minus unmerged. "
        "Answers changed: test questions on which the merged model chooses another option."
    )
    return build("merge", f"{suite.name}: merged against unmerged", rows, (remark,), keys=3)


def _merge_row(run: Run) -> Row:
    record, merge = run.record, run.record.merge
    assert merge is not None
    asked = {(s.task, s.protocol): s.n for s in record.evaluations if s.variant == "merged"}
    values = {
        ("", "seed"): record.seed,
        ("", "linears"): merge.num_merged,
        ("update", "largest"): merge.max_abs_delta,
        ("update", "relative"): merge.relative_delta,
        ("logits", "max difference"): merge.logits_max_difference,
        ("logits", "rms difference"): merge.logits_rms_difference,
        ("answers", "changed"): merge.answers_changed,
        ("answers", "of"): sum(asked.values()) or None,
    }
    row: Row = {("", "method"): label(record.row), ("", "task"): label(record.task)}
    for column, value in values.items():
        form = ".2e" if isinstance(value, float) else ""
        row[column] = number(value, form, [NOT_COMPARED] * (value is None))
    return row


def latency_table(suite: Results) -> Table | None:
    """Return a row per timed model, None where nothing was timed."""
    rows: list[Row] = [
        {
            ("", "run"): label(run.record.file_name.removesuffix(".json")),
            ("", "model"): label(latency.variant),
            ("", "time to first token"): _spread(latency.ttft_ms),
            ("", "time per token"): _spread(latency.per_token_ms),
            ("", "total"): _spread(latency.total_ms),
            ("", "repeats"): number(latency.total_ms.n),
        }
        for row in suite.rows
        for run in suite.select(row)
        for latency in run.record.latency
    ]
    remark = "Milliseconds, median [first and third quartile] over the repeats."
    return build("latency", f"{suite.name}: latency", rows, (remark,), keys=2) if rows else None


def _spread(spread: Spread) -> Cell:
    median, q1, q3 = (
        f"{x:.{decimals(spread.median)}f}" for x in (spread.median, spread.q1, spread.q3)
    )
    numbers = {"": spread.median, "q1": spread.q1, "q3": spread.q3}
    return Cell(f"{median} [{q1}, {q3}]", numbers)
