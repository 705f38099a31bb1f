"""Tables of the experts' activity: which are active, where, and how evenly."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path

from furina.records import ActivityRecord, TaskActivity
from furina.reporting.read.suites import Fact, require_comparable
from furina.reporting.tables.cells import Cell, Row, Table, build, decimals, label, missing, number

UNKNOWN = "the record does not say what the adapter was trained on"
NO_SEED = "the record does not say which seed it was trained from"
ONE_TASK = "one task, so there is nothing to compare its load with"
NO_UPDATE = "no two experts have an update that is not zero"
SILENT = "neither the shared nor the routed experts add anything"


def activity_tables(records: Mapping[Path, ActivityRecord]) -> list[Table]:
    """Return how active the experts are on each task, and how the experts and tasks differ.

    Raises RecordError naming two files that read other items of one task, or other weights.
    """
    if not records:
        return []
    require_comparable((path, _facts(record)) for path, record in records.items())
    return [_activity_table(records), _experts_table(records)]


def _activity_table(records: Mapping[Path, ActivityRecord]) -> Table:
    rows = [
        _head(record)
        | {("", "task"): label(task.task), ("", "tokens"): number(task.tokens)}
        | _activity_row(record, task)
        for record in records.values()
        for task in record.tasks
    ]
    remarks = (
        "Means over the linears whose tokens choose among experts. Top-K share: the part of a "
        "token's activity that its K most active of N experts have; if even: what it would be if "
        "all were equally active. Entropy: of a token's activity over the experts, 1 if all are "
        "equally active, 0 if one alone is.",
        "Load: how often an expert is among the K. Balance: N Σ load × share, 1 if even. "
        "Variation: its coefficient of variation over experts, 0 if even. Shared part: the norm "
        "of what the shared experts add, of that and the routed experts' together.",
    )
    return build("activity", "Activity of the experts", rows, remarks, keys=4)


def _activity_row(record: ActivityRecord, task: TaskActivity) -> Row:
    return {
        ("top-K share, %", "K of N"): _k_of_n(record),
        ("top-K share, %", "measured"): _mean(task.top_k_share, 100),
        ("top-K share, %", "if even"): _mean(record.even_top_k_share, 100),
        ("", "entropy"): _mean(task.entropy),
        ("load", "balance"): _mean(task.balance),
        ("load", "variation"): _mean(task.load_variation),
        ("load", "busiest, %"): _mean(task.busiest, 100),
        ("", "shared part, %"): _mean(
            task.shared_part or (), 100, record.missing.get("shared_part", SILENT)
        ),
    }


def _experts_table(records: Mapping[Path, ActivityRecord]) -> Table:
    rows = [_head(record) | _experts_row(record) for record in records.values()]
    remarks = (
        "Similarity: mean over pairs of experts of the absolute cosine of their updates (FURINA's: "
        "of their directions). Effective rank: exp of the entropy of the singular values of the "
        "whole update, each as a share of their sum. Both are means over linears with experts.",
        "Load overlap: the part of the load that two tasks put on the same experts, mean over "
        "linears; over all pairs, and of the pair that has least. Information: the part of the "
        "uncertainty about a token's task that its most active expert removes; by chance: what so "
        "many tokens would give on average if tasks did not differ.",
    )
    return build("activity_experts", "Experts and tasks compared", rows, remarks, keys=3)


def _experts_row(record: ActivityRecord) -> Row:
    weights = record.weights
    row: Row = {
        ("experts", "similarity"): _mean(weights.similarity, otherwise=NO_UPDATE),
        ("experts", "effective rank"): _mean(
            weights.effective_rank or (), otherwise=record.missing.get("effective_rank", "")
        ),
    }
    names = ("load overlap, %", "least, %", "pair", "information", "by chance")
    columns = [("tasks", name) for name in names]
    information, chance = record.task_information(), record.chance_information()
    if information is None or chance is None:
        return row | dict.fromkeys(columns, missing(ONE_TASK))
    overlaps = {
        f"{a.task}, {b.task}": statistics.fmean(record.overlap(a, b))
        for a, b in combinations(record.tasks, 2)
    }
    pair = min(overlaps, key=overlaps.__getitem__)
    cells = (
        _mean(overlaps.values(), 100),
        _mean([overlaps[pair]], 100),
        label(pair),
        _mean(information),
        _mean(chance),
    )
    return row | dict(zip(columns, cells, strict=True))


def _head(record: ActivityRecord) -> Row:
    return {
        ("", "row"): label(record.row),
        ("", "trained on"): label(record.task) if record.task else missing(UNKNOWN),
        ("", "seed"): missing(NO_SEED) if record.seed is None else number(record.seed),
    }


def _k_of_n(record: ActivityRecord) -> Cell:
    """Return how many experts are called most active, of how many."""
    fewest, most = min(record.experts), max(record.experts)
    text = f"{record.top_k} of {fewest}" + f" to {most}" * (fewest < most)
    return Cell(text, {"": record.top_k, "fewest experts": fewest, "most experts": most})


def _mean(values: Iterable[float | None], factor: float = 1.0, otherwise: str = "") -> Cell:
    """Return the mean of what is known, or that nothing is, with the reason."""
    known = [factor * value for value in values if value is not None]
    if not known:
        return missing(otherwise)
    mean = statistics.fmean(known)
    digits = 1 if factor != 1 else decimals(mean) + (abs(mean) < 10)
    return number(mean, f".{digits}f")


def _facts(record: ActivityRecord) -> Iterator[Fact]:
    if record.dtype:
        yield "the dtype", "", record.dtype
    yield "the backbone's hash", "", record.backbone.sha256
    for task in record.tasks:
        yield f"the hash of {task.task}'s items", "", task.sha256
        asked = f"{task.protocol} version {task.protocol_version}"
        yield f"the protocol of {task.task}", "", asked
