"""What became of each of the paper's tables and figures: a status, from the records by rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from furina.reporting import render
from furina.reporting.cells import Cell, Row, Table, build, label, missing
from furina.reporting.effort import command, seeds
from furina.reporting.pairs import VERDICTS, Pair, Verdict
from furina.reporting.places import Place
from furina.reporting.staleness import stale_notes
from furina.reporting.suites import Suite

ENOUGH = 3
"""Seeds from which on a spread over seeds says something."""
NOT_RUN = "no run of its suite has succeeded"
Status = Literal["reproduced", "within noise", "differs", "undecided", "not run"]
PAIRS = (
    "A row pair is a row of ours and its reference row, of which the paper gives the difference "
    "too. It agrees where our difference has the paper's sign and its 95 % interval leaves out 0, "
    "is within noise where the interval holds 0, and differs where it leaves out 0 with another "
    "sign. Times are compared over those of the base model in the same run, and their interval is "
    "found from quartiles as if they were normal."
)
RULES: dict[Status, str] = {
    "not run": "no run of the place's suite has succeeded",
    "differs": "a row pair differs",
    "undecided": "a row pair is not measured, or no difference of the paper's is known to us",
    "within noise": "a row pair is within noise",
    "reproduced": "every row pair agrees",
}
FIRST = "A status is the first of these that holds."


def status(verdicts: Sequence[Verdict]) -> Status:
    """Return a place's status from its row pairs, once its suite has been run; see RULES."""
    if "differs" in verdicts:
        return "differs"
    if not verdicts or "not measured" in verdicts:
        return "undecided"
    return "within noise" if "within noise" in verdicts else "reproduced"


def status_table(
    index: Sequence[Place],
    suites: Sequence[Suite],
    pairs: Mapping[str, Sequence[Pair]],
) -> Table:
    """Return a line per place and folder of results that repeats it, with its status.

    `pairs` holds each folder's row pairs.
    """
    rows = []
    for place in index:
        found = [suite for suite in suites if place.scale(suite.name) is not None]
        rows += [_row(place, suite, pairs.get(suite.name, ())) for suite in found]
        rows += [] if found else [_row(place, None, ())]
    remark = (
        "Status and row pairs: by the rules above, from the difference of each row to its "
        "reference row. Scale: cpu is a small backbone, few steps and part of the questions; paper "
        "is the paper's settings."
    )
    return build("status", "Status of every table and figure", rows, (remark,), keys=2)


def _row(place: Place, suite: Suite | None, pairs: Sequence[Pair]) -> Row:
    ran = suite is not None and any(run.succeeded for run in suite.runs)
    verdicts = [pair.verdict for pair in pairs]
    scale = missing(NOT_RUN) if suite is None else label(place.scale(suite.name) or "–")
    row: Row = {
        ("", "place"): label(place.place),
        ("", "what"): label(place.title),
        ("", "suite"): label(suite.name if suite else place.suite),
        ("", "scale"): scale,
        ("", "status"): label(
            status(verdicts) if ran else "not run",
            *(_reasons(place, suite, pairs) if suite else ()),
        ),
    }
    for name in VERDICTS:
        count = sum(found == name for found in verdicts)
        row["row pairs", name] = Cell(str(count), {"": count}) if ran else missing(NOT_RUN)
    row["", "seeds"] = seeds(suite) if suite and ran else missing(NOT_RUN)
    row["", "command"] = label(command(suite) if suite else f"furina run {place.suite} --scale cpu")
    return row


def _reasons(place: Place, suite: Suite, pairs: Sequence[Pair]) -> Iterator[str]:
    """Yield what a reader must know before believing a status."""
    runs = [run for run in suite.runs if run.succeeded]
    if (place.scale(suite.name) or "").startswith("cpu"):
        yield "scale cpu: another backbone, fewer steps and questions than the paper's"
    if place.numbers == "none":
        yield "the paper's numbers are not known to us"
    elif place.numbers != "all":
        yield f"the paper's numbers are known to us {place.numbers}"
    if place.file and not pairs:
        yield "the row that the paper's others are compared with has not been run"
    if absent := [pair.row for pair in pairs if pair.verdict == "not measured"]:
        yield f"no difference with an interval: {', '.join(absent)}"
    fewest = seeds(suite).numbers[""]
    if isinstance(fewest, int) and fewest < ENOUGH:
        yield f"fewer than {ENOUGH} seeds: the spread over seeds is hardly known"
    scores = [score for run in runs for score in run.record.evaluations]
    if suspects := sum(score.suspect for score in scores):
        yield f"{suspects} of {len(scores)} scores are not above chance"
    if failed := len(suite.failures):
        yield f"{failed} of {len(suite.runs)} runs failed or diverged"
    if stale := sum(bool(stale_notes(run.record, suite.changes)) for run in runs):
        yield f"{stale} of {len(runs)} runs are older than a change that moves numbers"
    if dirty := sum(bool(run.record.provenance.dirty) for run in runs):
        yield f"{dirty} of {len(runs)} runs are from a working tree with uncommitted changes"


def reproducing(statuses: Table, efforts: Table) -> str:
    """Return the text of REPRODUCING.md: the rules, the statuses, and what the runs took."""
    parts = [
        "# Reproducing the paper",
        "`furina report` writes this file from the records beside it; nothing in it is typed.",
        f"{PAIRS} {FIRST}",
        "\n".join(f"- **{name}**: {rule}" for name, rule in RULES.items()),
        f"## {statuses.title}",
        render.markdown(statuses).rstrip(),
        f"## {efforts.title}",
        render.markdown(efforts).rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def explanation() -> tuple[str, ...]:
    """Return how a status is found, a paragraph each."""
    rules = "; ".join(f"{name}, where {rule}" for name, rule in RULES.items())
    return PAIRS, f"{FIRST} {rules[0].upper()}{rules[1:]}."
