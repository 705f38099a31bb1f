"""What the runs of each suite took, and where: minutes, machines, versions and the command."""

from __future__ import annotations

import shlex
from collections.abc import Hashable, Iterable, Sequence

from furina.records import RunRecord
from furina.reporting.cells import Cell, Row, Table, build, label, missing
from furina.reporting.notes import ONE_MODEL
from furina.reporting.staleness import moment
from furina.reporting.suites import Suite

PACKAGES = ("torch", "transformers", "lightning", "lm_eval")
CHOICES = {"--rows", "--methods"}
"""Options that pick some of a suite's runs, each with one value in a record's command."""


def effort_table(suites: Sequence[Suite]) -> Table:
    """Return a line per suite, and one for all, where a run that suites share counts once."""
    rows = [
        _row(suite.name, [run.record for run in suite.runs], seeds(suite), command(suite))
        for suite in suites
    ]
    every = {_identity(run.record): run.record for suite in suites for run in suite.runs}
    rows.append(_row("all, each run once", list(every.values()), missing("see each suite"), ""))
    remark = (
        "Training: without evaluation. Wall clock: the sum over runs of finished minus started, "
        "evaluation and timing included, and pauses where a run was killed and went on later."
    )
    return build("effort", "What the runs took", rows, (remark,))


def _identity(record: RunRecord) -> Hashable:
    """Return what is the same for a run that is published in several suites."""
    dtype = record.config.get("dtype")
    return record.started, record.finished, record.method, record.task, record.seed, dtype


def _row(name: str, records: Sequence[RunRecord], seeds_cell: Cell, command: str) -> Row:
    trained = sum(record.training.seconds for record in records if record.training)
    passed = sum(_seconds(record) for record in records)
    failed = sum(record.status != "success" for record in records)
    machines = (_machine(record) for record in records)
    return {
        ("", "suite"): label(name),
        ("runs", "all"): _count(len(records)),
        ("runs", "failed"): _count(failed),
        ("runs", "seeds"): seeds_cell,
        ("training", "minutes"): Cell(f"{trained / 60:.1f}", {"": trained / 60}),
        ("wall clock", "hours"): Cell(f"{passed / 3600:.2f}", {"": passed / 3600}),
        ("", "backbone"): label(_listed(map(_backbone, records))),
        ("", "machine"): label(_listed(machines)),
        ("", "versions"): label(_listed(_versions(record) for record in records)),
        ("", "commit"): label(_listed((r.provenance.commit or "unknown")[:10] for r in records)),
        ("", "command"): label(command),
    }


def _seconds(record: RunRecord) -> float:
    started, finished = (moment(record.name, at) for at in (record.started, record.finished))
    return (finished - started).total_seconds()


def _count(number: int) -> Cell:
    return Cell(str(number), {"": number})


def _listed(words: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(words))


def _backbone(record: RunRecord) -> str:
    """Return what was run, in which dtype: suites of several stand in this table alone."""
    return f"{record.backbone.name} in {record.config.get('dtype')}"


def _machine(record: RunRecord) -> str:
    hardware = record.provenance.hardware
    return f"{hardware.accelerator or hardware.cpu}, {hardware.cores} cores"


def _versions(record: RunRecord) -> str:
    packages = record.provenance.packages
    found = (f"{name} {packages[name]}" for name in PACKAGES if name in packages)
    return ", ".join((f"Python {record.provenance.python}", *found))


def seeds(suite: Suite) -> Cell:
    """Return the fewest to the most seeds of a trained row on a task that succeeded."""
    counts: dict[tuple[str, str], int] = {}
    for run in suite.runs:
        if run.succeeded and run.record.row != "base":
            key = run.record.row, run.record.task
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return missing(ONE_MODEL)
    fewest, most = min(counts.values()), max(counts.values())
    return Cell(f"{fewest}" if fewest == most else f"{fewest} to {most}", {"": fewest})


def command(suite: Suite) -> str:
    """Return the command that runs a suite, from those that its records name."""
    commands = dict.fromkeys(_whole(run.record.command) for run in suite.runs)
    return "; ".join(commands)


def _whole(text: str) -> str:
    """Return a run's command without what picks that run."""
    words = shlex.split(text)
    picked = {i + step for i, word in enumerate(words) if word in CHOICES for step in (0, 1)}
    return shlex.join(word for i, word in enumerate(words) if i not in picked)
