"""What the runs of each suite took, and where: minutes, machines, versions and the command."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Sequence

from furina.records import RunRecord
from furina.reporting.read.changes import moment
from furina.reporting.read.suites import Results
from furina.reporting.tables.cells import (
    Cell,
    Row,
    Table,
    build,
    fewest_to_most,
    label,
    missing,
    number,
)
from furina.reporting.tables.notes import ONE_MODEL

PACKAGES = ("torch", "transformers", "lightning", "lm_eval")
CHOICES = {"--rows", "--methods"}
"""Options that pick some of a suite's runs, each with one value in a record's command."""


def effort_table(suites: Sequence[Results]) -> Table:
    """Return a line per suite, and one for all, where a run that suites share counts once."""
    rows = [
        _row(suite.name, [run.record for run in suite.runs], seeds(suite), command(suite))
        for suite in suites
    ]
    # A run that is published in several suites is the same in all of these.
    every = {
        (r.started, r.finished, r.method, r.task, r.seed, r.config.get("dtype")): r
        for suite in suites
        for r in (run.record for run in suite.runs)
    }
    rows.append(_row("all, each run once", list(every.values()), missing("see each suite"), ""))
    remark = (
        "Training: without evaluation. Wall clock: the sum over runs of finished minus started, "
        "evaluation and timing included, and pauses where a run was killed and went on later."
    )
    return build("effort", "What the runs took", rows, (remark,))


def _row(name: str, records: Sequence[RunRecord], seeds_cell: Cell, command: str) -> Row:
    trained = sum(record.training.seconds for record in records if record.training)
    hardware = [record.provenance.hardware for record in records]
    return {
        ("", "suite"): label(name),
        ("runs", "all"): number(len(records)),
        ("runs", "failed"): number(sum(record.status != "success" for record in records)),
        ("runs", "seeds"): seeds_cell,
        ("training", "minutes"): number(trained / 60, ".1f"),
        ("wall clock", "hours"): number(sum(map(_seconds, records)) / 3600, ".2f"),
        ("", "backbone"): _listed(f"{r.backbone.name} in {r.config.get('dtype')}" for r in records),
        ("", "machine"): _listed(f"{h.accelerator or h.cpu}, {h.cores} cores" for h in hardware),
        ("", "versions"): _listed(map(_versions, records)),
        ("", "commit"): _listed((r.provenance.commit or "unknown")[:10] for r in records),
        ("", "command"): label(command),
    }


def _seconds(record: RunRecord) -> float:
    started, finished = (moment(record.name, at) for at in (record.started, record.finished))
    return (finished - started).total_seconds()


def _listed(words: Iterable[str]) -> Cell:
    return label("; ".join(dict.fromkeys(words)))


def _versions(record: RunRecord) -> str:
    packages = record.provenance.packages
    found = (f"{name} {packages[name]}" for name in PACKAGES if name in packages)
    return ", ".join((f"Python {record.provenance.python}", *found))


def seeds(suite: Results) -> Cell:
    """Return the fewest to the most seeds of a trained row on a task that succeeded."""
    trained = [run.record for run in suite.runs if run.succeeded and run.record.row != "base"]
    counts = Counter((record.row, record.task) for record in trained)
    if not counts:
        return missing(ONE_MODEL)
    return fewest_to_most(counts.values())


def command(suite: Results) -> str:
    """Return the command that runs a suite, from those that its records name."""
    return "; ".join(dict.fromkeys(_whole(run.record.command) for run in suite.runs))


def _whole(text: str) -> str:
    """Return a run's command without what picks that run."""
    words = shlex.split(text)
    picked = {i + step for i, word in enumerate(words) if word in CHOICES for step in (0, 1)}
    return shlex.join(word for i, word in enumerate(words) if i not in picked)
