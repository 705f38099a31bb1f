"""Cost cells: parameters, latency and training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from furina.records import Latency, Spread
from furina.reporting.cells import Cell, Row, decimals, missing
from furina.reporting.notes import NO_RESULT, ONE_MODEL
from furina.reporting.staleness import stale_notes
from furina.reporting.suites import Run, Suite

TIMES: dict[str, Callable[[Latency], Spread]] = {
    "time to first token, ms": lambda latency: latency.ttft_ms,
    "time per token, ms": lambda latency: latency.per_token_ms,
    "total time, ms": lambda latency: latency.total_ms,
}
TRAINING = ("steps", "s per step", "minutes", "peak memory, GB")
GENERATION, TRAINING_TIME = ("time/generation",), ("time/training",)
"""What moves the times of either."""
NOT_TIMED = "not timed"
NO_BASE_TIME = "the base model was not timed in the same run, so there is no ratio"


def trainable(row: str, runs: Sequence[Run]) -> Cell:
    """Return the number of trained parameters."""
    if row == "base":
        return Cell("0", {"": 0, "without router": 0})
    trained = [run.record.training for run in runs if run.record.training]
    if not trained:
        return missing(NO_RESULT)
    count = trained[0].trainable
    numbers = {"": count, "without router": trained[0].trainable_without_router}
    return Cell(_count(count), numbers)


def _count(number: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def time(suite: Suite, row: str, variant: str, spread: Callable[[Latency], Spread]) -> Cell:
    """Return a median time and its ratio to base, as the median over the row's runs."""
    if row == "base":
        return _base_time(suite, variant, spread)
    spreads, ratios = [], []
    old: list[str] = []
    for run in suite.select(row):
        times = {latency.variant: spread(latency) for latency in run.record.latency}
        if variant in times:
            spreads.append(times[variant])
            old += stale_notes(run.record, suite.changes, GENERATION)
        if variant in times and "base" in times:
            ratios.append(times[variant].median / times["base"].median)
    if not spreads:
        return missing(NOT_TIMED if suite.select(row) else NO_RESULT)
    return _time_cell(spreads, ratios, old)


def _base_time(suite: Suite, variant: str, spread: Callable[[Latency], Spread]) -> Cell:
    """Return the base model's time over all runs, since each run times it beside its own."""
    if variant == "merged":
        return missing(ONE_MODEL)
    runs = [run for run in suite.runs if run.succeeded]
    times = [spread(t) for run in runs for t in run.record.latency if t.variant == "base"]
    old = [note for run in runs for note in stale_notes(run.record, suite.changes, GENERATION)]
    return _time_cell(times, [1.0], old) if times else missing(NOT_TIMED)


def _time_cell(spreads: Sequence[Spread], ratios: Sequence[float], old: Sequence[str]) -> Cell:
    middle = {
        name: statistics.median(getattr(spread, name) for spread in spreads)
        for name in ("median", "q1", "q3")
    }
    ratio = statistics.median(ratios) if ratios else None
    text = f"{middle['median']:.{decimals(middle['median'])}f}"
    if ratio is not None:
        text += f" ({ratio:.2f}×)"
    numbers = {
        "": middle["median"],
        "q1": middle["q1"],
        "q3": middle["q3"],
        "repeats": sum(s.n for s in spreads),
        "ratio to base": ratio,
    }
    unpaired = () if ratios else (NO_BASE_TIME,)
    return Cell(text, numbers, (*unpaired, *dict.fromkeys(old)))


def training(suite: Suite, row: str) -> Row:
    """Return the cells of a row's steps, mean times and highest peak memory."""
    runs = suite.select(row)
    trained = [run.record.training for run in runs if run.record.training]
    columns = [("training", name) for name in TRAINING]
    if not trained:
        reason = ONE_MODEL if row == "base" else NO_RESULT
        return {column: missing(reason) for column in columns}
    steps = sorted({run.steps for run in trained})
    step = statistics.fmean(run.seconds / run.steps for run in trained)
    minutes = statistics.fmean(run.seconds for run in trained) / 60
    memory = max(run.peak_memory_bytes for run in trained) / 10**9
    notes = (n for run in runs for n in stale_notes(run.record, suite.changes, TRAINING_TIME))
    old = tuple(dict.fromkeys(notes))
    cells = (
        Cell(" to ".join(dict.fromkeys(map(str, (steps[0], steps[-1])))), {"": steps[-1]}),
        Cell(f"{step:.{decimals(step)}f}", {"": step}, old),
        Cell(f"{minutes:.1f}", {"": minutes}, old),
        Cell(f"{memory:.2f}", {"": memory}),
    )
    return dict(zip(columns, cells, strict=True))
