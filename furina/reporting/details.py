"""Two tables beside the main one: how exact each merge is, and the spread of the latencies."""

from __future__ import annotations

from furina.records import Spread
from furina.reporting.cells import Cell, Number, Row, Table, build, decimals, label, missing
from furina.reporting.suites import Run, Suite

NOT_COMPARED = "the two models' outputs were not compared"


def merge_table(suite: Suite) -> Table | None:
    """Return a row per merged run, None where nothing was merged."""
    runs = [run for row in suite.rows for run in suite.select(row) if run.record.merge]
    if not runs:
        return None
    remark = (
        "Update: largest entry, and norm relative to the weights'. Logits: merged minus unmerged. "
        "Answers changed: test questions on which the merged model chooses another option."
    )
    rows = [_merge_row(run) for run in runs]
    return build("merge", f"{suite.name}: merged against unmerged", rows, (remark,), keys=3)


def _merge_row(run: Run) -> Row:
    record, merge = run.record, run.record.merge
    assert merge is not None
    sets = {(s.task, s.protocol): s.n for s in record.evaluations if s.variant == "merged"}
    return {
        ("", "method"): label(record.row),
        ("", "task"): label(record.task),
        ("", "seed"): _number(record.seed),
        ("", "linears"): _number(merge.num_merged),
        ("update", "largest"): _number(merge.max_abs_delta),
        ("update", "relative"): _number(merge.relative_delta),
        ("logits", "max difference"): _number(merge.logits_max_difference),
        ("logits", "rms difference"): _number(merge.logits_rms_difference),
        ("answers", "changed"): _number(merge.answers_changed),
        ("answers", "of"): _number(sum(sets.values()) or None),
    }


def _number(value: Number) -> Cell:
    if value is None:
        return missing(NOT_COMPARED)
    return Cell(f"{value:.2e}" if isinstance(value, float) else str(value), {"": value})


def latency_table(suite: Suite) -> Table | None:
    """Return a row per timed model, None where nothing was timed."""
    rows = []
    for row in suite.rows:
        for run in suite.select(row):
            rows += _latency_rows(run)
    remark = "Milliseconds, median [first and third quartile] over the repeats."
    return build("latency", f"{suite.name}: latency", rows, (remark,), keys=2) if rows else None


def _latency_rows(run: Run) -> list[Row]:
    return [
        {
            ("", "run"): label(run.record.file_name.removesuffix(".json")),
            ("", "model"): label(latency.variant),
            ("", "time to first token"): _spread(latency.ttft_ms),
            ("", "time per token"): _spread(latency.per_token_ms),
            ("", "total"): _spread(latency.total_ms),
            ("", "repeats"): _number(latency.total_ms.n),
        }
        for latency in run.record.latency
    ]


def _spread(spread: Spread) -> Cell:
    digits = decimals(spread.median)
    text = f"{spread.median:.{digits}f} [{spread.q1:.{digits}f}, {spread.q3:.{digits}f}]"
    return Cell(text, {"": spread.median, "q1": spread.q1, "q3": spread.q3})
