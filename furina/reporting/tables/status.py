"""What became of each of the paper's tables and figures: a status, from the records by rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from furina.reporting.compare.pairs import UNITS, VERDICTS, RowPair, Verdict
from furina.reporting.read.paper import Exhibit, Measure, PaperTable
from furina.reporting.read.suites import Results
from furina.reporting.tables import render
from furina.reporting.tables.cells import (
    Row,
    Table,
    build,
    decimals,
    interval,
    label,
    missing,
    number,
)
from furina.reporting.tables.effort import command, seeds
from furina.reporting.tables.notes import UNMEASURED

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
    index: Sequence[Exhibit],
    suites: Sequence[Results],
    pairs: Mapping[str, Sequence[RowPair]],
) -> Table:
    """Return a line per place and folder of results that repeats it, with its status.

    `pairs` holds each folder's row pairs.
    """
    rows = []
    for exhibit in index:
        found = [suite for suite in suites if exhibit.scale(suite.name) is not None]
        rows += [_row(exhibit, suite, pairs.get(suite.name, ())) for suite in found]
        rows += [] if found else [_row(exhibit, None, ())]
    remark = (
        "Status and row pairs: by the rules above, from the difference of each row to its "
        "reference row. Scale: cpu is a small backbone, few steps and part of the questions; paper "
        "is the paper's settings."
    )
    return build("status", "Status of every table and figure", rows, (remark,), keys=2)


def _row(exhibit: Exhibit, suite: Results | None, pairs: Sequence[RowPair]) -> Row:
    ran = suite is not None and any(run.succeeded for run in suite.runs)
    verdicts = [pair.verdict for pair in pairs]
    scale = missing(NOT_RUN) if suite is None else label(exhibit.scale(suite.name) or "–")
    row: Row = {
        ("", "place"): label(exhibit.place),
        ("", "what"): label(exhibit.title),
        ("", "suite"): label(suite.name if suite else exhibit.suite),
        ("", "scale"): scale,
        ("", "status"): label(
            status(verdicts) if ran else "not run",
            *(_reasons(exhibit, suite, pairs) if suite else ()),
        ),
    }
    for name in VERDICTS:
        count = sum(found == name for found in verdicts)
        row["row pairs", name] = number(count) if ran else missing(NOT_RUN)
    row["", "seeds"] = seeds(suite) if suite and ran else missing(NOT_RUN)
    row["", "command"] = label(
        command(suite) if suite else f"furina run {exhibit.suite} --scale cpu"
    )
    return row


def _reasons(exhibit: Exhibit, suite: Results, pairs: Sequence[RowPair]) -> Iterator[str]:
    """Yield what a reader must know before believing a status."""
    runs = [run for run in suite.runs if run.succeeded]
    if (exhibit.scale(suite.name) or "").startswith("cpu"):
        yield "scale cpu: another backbone, fewer steps and questions than the paper's"
    if exhibit.numbers == "none":
        yield "the paper's numbers are not known to us"
    elif exhibit.numbers != "all":
        yield f"the paper's numbers are known to us {exhibit.numbers}"
    if exhibit.file and not pairs:
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
    if stale := sum(bool(suite.stale_notes([run])) for run in runs):
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


def pair_table(
    suite: Results,
    paper: PaperTable,
    measure: Measure,
    pairs: Sequence[RowPair],
    reference: str,
) -> Table | None:
    """Return a line per row pair that a status counts, None where the paper gives no difference."""
    if not pairs:
        return None
    rows = [_pair_line(pair, *UNITS[measure], reference) for pair in pairs]
    title = f"{suite.name}: row pairs with {reference}, beside the paper's {paper.place}"
    return build("pairs", title, rows, (PAIRS,))


def _pair_line(pair: RowPair, unit: str, apart: str, reference: str) -> Row:
    gap = f"difference to {reference}, {apart}"
    cells: Row = {("", "row"): label(pair.row)}
    for group, level, difference, ends in (
        ("ours", pair.level, pair.difference, pair.interval),
        ("in the paper", pair.paper_level, pair.paper, None),
    ):
        for name, value, sign in ((unit, level, ""), (gap, difference, "+")):
            if value is None:
                cells[group, name] = missing(UNMEASURED)
            else:
                shown = ends if name == gap else None
                cells[group, name] = interval(value, shown, min(decimals(value), 1), sign)
    cells["", "verdict"] = label(pair.verdict)
    return cells
