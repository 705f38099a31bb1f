"""The main table: a line per row, accuracy and cost, unmerged and merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from furina.reporting import costs
from furina.reporting.accuracy import accuracy, gain_cell, macro
from furina.reporting.cells import Cell, Row, Table, build, label, missing
from furina.reporting.notes import DIRTY, FEW_SEEDS, NO_COMMIT, NO_RESULT, ONE_MODEL
from furina.reporting.suites import Run, Suite

VARIANTS = ("unmerged", "merged")


def main_table(suite: Suite) -> Table:
    """Return the suite's main table: a line per row, a group of columns per task and cost."""
    return build(
        "main",
        f"{suite.name}: accuracy and cost under protocol {suite.protocol}",
        [main_row(suite, row) for row in suite.rows],
        _remarks(suite),
    )


def main_row(suite: Suite, row: str) -> Row:
    """Return the main table's line of a row."""
    runs = suite.select(row)
    cells: Row = {("", "method"): label(row, *_tree_notes(runs))}
    cells["", "seeds"] = seeds_cell(row, runs)
    cells["", "trainable"] = costs.trainable(row, runs)
    for task in suite.tasks:
        group = f"{task} {suite.metric}, %"
        for variant in VARIANTS:
            cells[group, variant] = accuracy(suite, row, task, variant)
        cells[group, "gain"] = gain_cell(suite, row, task)
    if len(suite.tasks) > 1:
        for variant in VARIANTS:
            cells[f"mean of {len(suite.tasks)} tasks, %", variant] = macro(suite, row, variant)
    for group, spread in costs.TIMES.items():
        for variant in VARIANTS:
            cells[group, variant] = costs.time(suite, row, variant, spread)
    cells.update(costs.training(suite, row))
    return cells


def _tree_notes(runs: Iterable[Run]) -> list[str]:
    states = {run.record.provenance.dirty for run in runs}
    return [note for state, note in ((True, DIRTY), (None, NO_COMMIT)) if state in states]


def seeds_cell(row: str, runs: Sequence[Run]) -> Cell:
    """Return how many seeds a row has, of the tasks that have fewest and most."""
    if row == "base":
        return missing(ONE_MODEL)
    counts = {task: 0 for task in sorted(run.record.task for run in runs)}
    for run in runs:
        counts[run.record.task] += 1
    if not counts:
        return missing(NO_RESULT)
    fewest, most = min(counts.values()), max(counts.values())
    text = str(most) if fewest == most else f"{fewest} to {most}"
    return Cell(text, {"": fewest}, FEW_SEEDS.get(fewest, ()))


def _remarks(suite: Suite) -> tuple[str, ...]:
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


def task_remark(suite: Suite, task: str) -> str:
    """Return what a task is scored on, "" where it was not."""
    for run in suite.runs:
        for score in run.record.evaluations:
            if (score.task, score.protocol) == (task, suite.protocol):
                subset = next(d.test_subset for d in run.record.data if d.task == task)
                return f"{task}: {score.n} items ({subset}), chance {100 * score.chance:.1f} %."
    return ""


def latency_remark(suite: Suite) -> list[str]:
    """Return how the suite's models were timed, if they were."""
    timed = [latency for run in suite.runs for latency in run.record.latency]
    if not timed:
        return []
    return [
        f"Latency: median, batch 1, {timed[0].prompt_tokens} tokens in and "
        f"{timed[0].new_tokens} out; × is the ratio to the base model timed in the same run."
    ]


def conditions(suite: Suite) -> str:
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


def failure_remarks(suite: Suite) -> tuple[str, ...]:
    """Return a sentence for each run that diverged or failed."""
    return tuple(
        f"No result: {run.record.row} on {run.record.task}, seed {run.record.seed} "
        f"{run.record.status}{f': {run.record.error}' if run.record.error else ''}."
        for run in suite.failures
    )
