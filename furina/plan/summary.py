"""The table of a dry run: what all runs of a list come to, and which of them do not fit."""

from __future__ import annotations

import json
from collections.abc import Sequence

from furina.errors import ConfigurationError
from furina.experiment.config import RunConfig
from furina.plan.devices import UTILISATION, Device
from furina.plan.plan import Plan, micro_rows, plan
from furina.reporting.tables.cells import Cell, Row, Table, build, decimals, label, missing

MILLION, GIGA, PETA = 1e6, 1e9, 1e15
LEAST = 0.001
"""Below which a number is only said to be so."""
MICRO_BATCHES = (16, 8, 4, 2, 1)
"""Sizes that are tried where a run does not fit."""
UNTRAINED = "the untouched backbone trains nothing"


def summary(plans: Sequence[Plan]) -> Table:
    """Return a row for each backbone and row of the runs' suites, and all together in the remarks.

    A cell that is planned twice, for two suites that share it, counts once.
    Raises ConfigurationError where there are no plans.
    """
    if not plans:
        raise ConfigurationError("There are no runs to plan: choose others.")
    cells = list({_key(each.config): each for each in plans}.values())
    rows = []
    for backbone in dict.fromkeys(each.config.backbone for each in cells):
        own = [each for each in cells if each.config.backbone == backbone]
        for row in dict.fromkeys(_row(each.config) for each in own):
            rows.append(_line(backbone, row, [each for each in own if _row(each.config) == row]))
    title = f"Plan of {len(cells):,} cells on {plans[0].device.title}"
    return build("plan", title, rows, _remarks(plans, cells), keys=2)


def advice(short: Plan) -> str:
    """Say how a run that does not fit would fit, or that it does not at all."""
    config = short.config
    if short.adapted is None:
        return "only a device with more memory would do"
    sizes = [size for size in MICRO_BATCHES if size < micro_rows(config)]
    again = {"gradient_checkpointing": True}
    possible = not (config.compile or config.gradient_checkpointing)
    ways: list[dict[str, bool | int]] = [dict(again)] if possible else []
    ways += [{"micro_batch_size": size} for size in sizes]
    ways += [{**again, "micro_batch_size": size} for size in sizes if possible]
    for changes in ways:
        if not plan(config.updated(changes), short.device, short.measured).excess:
            words = (f"{name}={str(value).lower()}" for name, value in changes.items())
            return f"{' and '.join(words)} would fit"
    return "no micro-batch fits: a device with more memory would do, or several with strategy=fsdp"


def _key(config: RunConfig) -> str:
    return json.dumps(config.cell.to_dict(), sort_keys=True)


def _row(config: RunConfig) -> str:
    return config.row or config.method


def _line(backbone: str, row: str, group: Sequence[Plan]) -> Row:
    trained = [each for each in group if each.adapted]
    largest = max(group, key=lambda each: each.memory.total)
    hours = [each.hours for each in group]
    return {
        ("", "backbone"): label(backbone),
        ("", "row"): label(row),
        ("", "cells"): Cell(f"{len(group):,}", {"": len(group)}),
        ("adapted", "linears"): _count(trained, [len(each.linears) for each in trained], 1),
        ("adapted", "parameters, M"): _count(
            trained, [each.trainable for each in trained], MILLION
        ),
        ("training", "tokens, M"): _sum(trained, [each.tokens for each in trained], MILLION),
        ("training", "PFLOP"): _sum(trained, [each.training_flops for each in trained], PETA),
        ("scoring", "PFLOP"): _sum(group, [each.scoring_flops for each in group], PETA),
        ("device hours", "longest"): _sum(group, [max(hours)], 1),
        ("device hours", "together"): _sum(group, hours, 1),
        ("memory", "GB"): _gigabytes(largest.memory.total),
        ("memory", "short by"): _short(largest),
    }


def _count(trained: Sequence[Plan], values: Sequence[int], unit: float) -> Cell:
    """Return the count that cells of a row have in common, the largest if they differ."""
    if not trained:
        return missing(UNTRAINED)
    text = f"{max(values):,}" if unit == 1 else _number(max(values) / unit)
    return Cell(text, {"": max(values)})


def _sum(group: Sequence[Plan], values: Sequence[float], unit: float) -> Cell:
    """Return a sum of what may be bounds, with the reasons."""
    if not group:
        return missing(UNTRAINED)
    notes = tuple(dict.fromkeys(note for each in group for note in each.notes))
    bound = "" if all(each.counted_by for each in group) else "≤ "
    text = _number(sum(values) / unit)
    return Cell(bound + text.removeprefix("< ") if bound else text, {"": sum(values)}, notes)


def _gigabytes(size: int) -> Cell:
    return Cell(_number(size / GIGA), {"": size})


def _short(largest: Plan) -> Cell:
    """Return what the device lacks for a row's largest cell, with what would help."""
    if not largest.excess:
        return missing("it fits")
    cell = _gigabytes(largest.excess)
    return Cell(cell.text, cell.numbers, (advice(largest),), bold=True)


def _number(value: float) -> str:
    if 0 < value < LEAST:
        return f"< {LEAST}"
    return f"{value:.2g}" if 0 < value < 0.1 else f"{value:,.{decimals(value)}f}"


def _speed(target: Device, configs: Sequence[RunConfig]) -> str:
    """Say how fast a device is taken to be."""
    if target.peak is not None:
        return f"one {target.title} at {UTILISATION:.0%} of its {target.peak / 1e12:.4g} TFLOP/s"
    trained = [config for config in configs if not config.is_base] or configs
    reached = sorted({target.speed(config).training / 1e12 for config in trained})
    between = " to ".join(f"{rate:.2g}" for rate in dict.fromkeys((reached[0], reached[-1])))
    dtypes = " and ".join(sorted({config.dtype for config in configs}))
    return f"{target.title} at {between} TFLOP/s in {dtypes}, as timed just now"


def _title(each: Plan) -> str:
    config = each.config
    return f"{_row(config)} on {config.task}, seed {config.seed}, with {config.backbone}"


def _remarks(plans: Sequence[Plan], cells: Sequence[Plan]) -> tuple[str, ...]:
    shared, target = len(plans) - len(cells), plans[0].device
    longest = max(cells, key=lambda each: each.hours)
    largest = max(cells, key=lambda each: each.memory.total)
    tokens = sum(each.tokens for each in cells) / MILLION
    hours = sum(each.hours for each in cells)
    remarks = [
        f"Together {len(cells):,} cells, {_number(tokens)} M training tokens, {_number(hours)} "
        f"hours on {_speed(target, [each.config for each in cells])}.",
        f"Longest is {_title(longest)}: {_number(longest.hours)} hours.",
        f"Largest is {_title(largest)}: {_number(largest.memory.total / GIGA)} GB.",
    ]
    if short := sum(bool(each.excess) for each in cells):
        most = f"{_number(target.memory / GIGA)} GB"
        remarks.append(f"{short:,} of {len(cells):,} cells do not fit into its {most}.")
    if shared:
        remarks.append(f"{shared:,} more are cells that another suite has as well.")
    remarks.append(
        "Not part of it: loading, merging, checkpoints, latency and activity; of memory, what an "
        "allocator leaves unused."
    )
    return tuple(remarks)
