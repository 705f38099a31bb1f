"""The main table: a line per row, accuracy and cost, unmerged and merged."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from furina.records import Latency, Spread
from furina.reporting.compare.timing import medians
from furina.reporting.read.scores import served
from furina.reporting.read.suites import Results, Run
from furina.reporting.tables.cells import (
    Cell,
    Row,
    Table,
    build,
    decimals,
    fewest_to_most,
    label,
    missing,
    number,
)
from furina.reporting.tables.notes import DIRTY, FEW_SEEDS, NO_COMMIT, NO_RESULT, ONE_MODEL
from furina.reporting.tables.scores import accuracy, gain_cell, macro_cell

VARIANTS = ("unmerged", "merged")
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


def main_table(suite: Results) -> Table:
    """Return the suite's main table: a line per row, a group of columns per task and cost."""
    return build(
        "main",
        f"{suite.name}: accuracy and cost under protocol {suite.protocol}",
        [main_row(suite, row) for row in suite.rows],
        _remarks(suite),
    )


def main_row(suite: Results, row: str) -> Row:
    """Return the main table's line of a row."""
    runs = suite.select(row)
    cells: Row = {("", "method"): label(row, *_tree_notes(runs))}
    cells["", "seeds"] = seeds_cell(row, runs)
    cells["", "trainable"] = _trainable(row, runs)
    for task in suite.tasks:
        group = f"{task} {suite.metric}, %"
        for variant in VARIANTS:
            cells[group, variant] = accuracy(suite, row, task, variant)
        cells[group, "gain"] = gain_cell(suite, row, task)
    if len(suite.tasks) > 1:
        for variant in VARIANTS:
            cells[f"mean of {len(suite.tasks)} tasks, %", variant] = macro_cell(suite, row, variant)
    for group, spread in TIMES.items():
        for variant in VARIANTS:
            cells[group, variant] = _time(suite, row, variant, spread)
    cells.update(_training(suite, row))
    return cells


def _tree_notes(runs: Iterable[Run]) -> list[str]:
    states = {run.record.provenance.dirty for run in runs}
    return [note for state, note in ((True, DIRTY), (None, NO_COMMIT)) if state in states]


def seeds_cell(row: str, runs: Sequence[Run]) -> Cell:
    """Return how many seeds a row has, of the tasks that have fewest and most."""
    if row == "base":
        return missing(ONE_MODEL)
    if not runs:
        return missing(NO_RESULT)
    counts = Counter(run.record.task for run in runs).values()
    return fewest_to_most(counts, FEW_SEEDS.get(min(counts), ()))


def row_head(suite: Results, row: str, shown: Results) -> Row:
    """Return the cells that name a row, and the model that the scores of `shown` are of."""
    return {
        ("", "row"): label(row),
        ("", "model"): label("base" if row == "base" else served(shown, row)),
        ("", "seeds"): seeds_cell(row, suite.select(row)),
    }


def _remarks(suite: Results) -> tuple[str, ...]:
    remarks = [
        "Accuracy: ± one standard error over the questions; unmerged and merged are two "
        "separate scorings of two models. Gain: unmerged minus base in points, paired over "
        "questions, and in standard errors of that difference."
    ]
    remarks += [task_remark(suite, task) for task in suite.tasks]
    remarks += [*latency_remark(suite), conditions(suite)]
    remarks.append(
        "Training: times are means over runs, without evaluation; memory is the highest peak."
    )
    return tuple(remark for remark in remarks if remark) + failure_remarks(suite)


def task_remark(suite: Results, task: str) -> str:
    """Return what a task is scored on, "" where it was not."""
    for run in suite.runs:
        for score in run.record.evaluations:
            if (score.task, score.protocol) == (task, suite.protocol):
                subset = next(d.test_subset for d in run.record.data if d.task == task)
                return f"{task}: {score.n} items ({subset}), chance {100 * score.chance:.1f} %."
    return ""


def latency_remark(suite: Results) -> list[str]:
    """Return how the suite's models were timed, if they were."""
    timed = [latency for run in suite.runs for latency in run.record.latency]
    if not timed:
        return []
    return [
        f"Latency: median, batch 1, {timed[0].prompt_tokens} tokens in and "
        f"{timed[0].new_tokens} out; × is the ratio to the base model timed in the same run."
    ]


def conditions(suite: Results) -> str:
    """Return on what the suite was run: backbone, protocol, commits and machines."""
    records = [run.record for run in suite.runs]
    backbone = max((record.backbone for record in records), key=lambda b: b.sha256 != "")
    machines = dict.fromkeys(
        f"{h.accelerator or h.cpu}, {h.cores} cores, {h.threads} threads"
        for h in (record.provenance.hardware for record in records)
    )
    commits = dict.fromkeys((record.provenance.commit or "unknown")[:10] for record in records)
    scored = [s for record in records for s in record.evaluations if s.protocol == suite.protocol]
    versions = ", ".join(dict.fromkeys(score.protocol_version for score in scored))
    prompt = (
        f", protocol {suite.protocol} version {versions}, scored by the {scored[0].engine} engine, "
        f"lm-eval {scored[0].lm_eval}"
        if scored
        else ""
    )
    return (
        f"Backbone {backbone.name} (sha256 {backbone.sha256[:12]}){prompt}; "
        f"commit {', '.join(commits)}; on {'; '.join(machines)}."
    )


def failure_remarks(suite: Results) -> tuple[str, ...]:
    """Return a sentence for each run that diverged or failed."""
    return tuple(
        f"No result: {run.record.row} on {run.record.task}, seed {run.record.seed} "
        f"{run.record.status}{f': {run.record.error}' if run.record.error else ''}."
        for run in suite.failures
    )


def _trainable(row: str, runs: Sequence[Run]) -> Cell:
    """Return the number of trained parameters."""
    if row == "base":
        return Cell("0", {"": 0, "without router": 0})
    trained = [run.record.training for run in runs if run.record.training]
    if not trained:
        return missing(NO_RESULT)
    count = trained[0].trainable
    numbers = {"": count, "without router": trained[0].trainable_without_router}
    return Cell(_short(count), numbers)


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def _time(suite: Results, row: str, variant: str, spread: Callable[[Latency], Spread]) -> Cell:
    """Return a median time and its ratio to base, as the median over the row's runs.

    The base model's is over all runs, since each run times it beside its own.
    """
    if row == "base" and variant == "merged":
        return missing(ONE_MODEL)
    own = "base" if row == "base" else variant
    runs = [run for run in suite.runs if run.succeeded] if row == "base" else suite.select(row)
    timed: list[tuple[Run, dict[str, Spread]]] = []
    for run in runs:
        times: dict[str, Spread] = {each.variant: spread(each) for each in run.record.latency}
        timed += [(run, times)] if own in times else []
    if not timed:
        return missing(NO_RESULT if row != "base" and not runs else NOT_TIMED)
    ratios = [times[own].median / times["base"].median for _, times in timed if "base" in times]
    middle = medians([times[own] for _, times in timed])
    ratio = statistics.median(ratios) if ratios else None
    text = f"{middle.median:.{decimals(middle.median)}f}"
    text += "" if ratio is None else f" ({ratio:.2f}×)"
    numbers = {
        "": middle.median,
        "q1": middle.q1,
        "q3": middle.q3,
        "repeats": middle.n,
        "ratio to base": ratio,
    }
    unpaired = [] if ratios else [NO_BASE_TIME]
    old = suite.stale_notes(runs if row == "base" else (run for run, _ in timed), GENERATION)
    return Cell(text, numbers, [*unpaired, *old])


def _training(suite: Results, row: str) -> Row:
    """Return the cells of a row's steps, mean times and highest peak memory."""
    runs = suite.select(row)
    trained = [run.record.training for run in runs if run.record.training]
    columns = [("training", name) for name in TRAINING]
    if not trained:
        return dict.fromkeys(columns, missing(ONE_MODEL if row == "base" else NO_RESULT))
    steps = sorted({run.steps for run in trained})
    step = statistics.fmean(run.seconds / run.steps for run in trained)
    minutes = statistics.fmean(run.seconds for run in trained) / 60
    memory = max(run.peak_memory_bytes for run in trained) / 10**9
    old = suite.stale_notes(runs, TRAINING_TIME)
    cells = (
        Cell(" to ".join(dict.fromkeys(map(str, (steps[0], steps[-1])))), {"": steps[-1]}),
        number(step, f".{decimals(step)}f", old),
        number(minutes, ".1f", old),
        number(memory, ".2f"),
    )
    return dict(zip(columns, cells, strict=True))
