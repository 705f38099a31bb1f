"""Tables of the studies: the search on held-out train rows, and the selection loss on or off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from furina.records import RecordError, SearchRecord, SelectionRecord
from furina.reporting.read.statistics import paired, standard_error, unpaired
from furina.reporting.read.suites import Fact, dtype_facts, require_comparable
from furina.reporting.tables.cells import Cell, Row, Table, build, label, missing, number
from furina.reporting.tables.notes import UNMEASURED

Block = tuple[str, str, int]
Point = tuple[float, float | None]
S = TypeVar("S", SearchRecord, SelectionRecord)

UNTRIED = "not tried"
DIVERGED = "diverged"
ONE_SEED = "one seed: no standard error over seeds"
OTHER_SEEDS = "unpaired: the two sides have different seeds"
OFF = "the loss-off run itself"
NO_OFF = "no loss-off run to compare with"
MEAN = "mean over tasks"


def block(record: SearchRecord) -> Block:
    """Return what a trial is compared within: its method, protocol and budget."""
    return record.method, record.protocol, record.steps


def best_point(records: Iterable[SearchRecord]) -> Point:
    """Return the (learning rate, magnitude multiplier) of the highest mean over tasks.

    `records` are one block. Only points that ended well on every task and seed compete; ties
    go to the lower learning rate. Raises RecordError where there is none.
    """
    found = list(records)
    cells = {(r.task, r.seed) for r in found}
    values: dict[Point, dict[Hashable, float]] = {}
    for record in found:
        if record.value is not None:
            point = record.learning_rate, record.magnitude_multiplier
            values.setdefault(point, {})[record.task, record.seed] = record.value
    whole = {point: scores for point, scores in values.items() if scores.keys() == cells}
    if not whole:
        raise RecordError("No searched point ended well on every task and seed; search further.")
    return min(whole, key=lambda p: (-_task_mean(whole[p]), p[0], p[1] or 0.0))


def _task_mean(scores: Mapping[Hashable, float]) -> float:
    return round(fmean(scores.values()), 12)


def search_table(records: Mapping[Path, SearchRecord]) -> Table:
    """Return the grid: a column per learning rate, each block's chosen cell bold and starred."""
    _check_unique(records, lambda r: (block(r), r.task, r.learning_rate, r.magnitude_multiplier))
    require_comparable((path, _search_facts(record)) for path, record in records.items())
    trials = list(records.values())
    rates = sorted({trial.learning_rate for trial in trials})
    rows: list[Row] = []
    for key in sorted({block(trial) for trial in trials}):
        rows += _block_rows([trial for trial in trials if block(trial) == key], rates)
    metrics = " or ".join(sorted({trial.metric for trial in trials}))
    tried = Counter(r.method for r in trials)
    effort = ", ".join(f"{method} {count}" for method, count in sorted(tried.items()))
    remarks = (
        f"{metrics} in %, ± one standard error, on rows held out of train; no test row was used. "
        "★ marks the highest mean over tasks within a method, protocol and number of steps.",
        f"Trials: {effort}; {sum(r.seconds for r in trials) / 60:.0f} minutes in all.",
    )
    return build("search", "Search on rows held out of train", rows, remarks, keys=5)


def _block_rows(trials: Sequence[SearchRecord], rates: Sequence[float]) -> list[Row]:
    try:
        chosen = best_point(trials)
    except RecordError:
        chosen = None
    tasks = sorted({trial.task for trial in trials})
    rows = []
    for multiplier in sorted({t.magnitude_multiplier for t in trials}, key=lambda m: m or 0.0):
        same = [t for t in trials if t.magnitude_multiplier == multiplier]
        for task in tasks + [MEAN] * (len(tasks) > 1):
            shown = "" if multiplier is None else f"{multiplier:g}×"
            row: Row = {
                ("", "method"): label(trials[0].method),
                ("", "protocol"): label(trials[0].protocol),
                ("", "steps"): number(trials[0].steps),
                ("", "magnitude"): Cell(shown, {"": multiplier}),
                ("", "task"): label(task),
            }
            last = task == (MEAN if len(tasks) > 1 else tasks[0])
            for rate in rates:
                at_rate = [t for t in same if t.learning_rate == rate]
                star = last and (rate, multiplier) == chosen
                row["learning rate", f"{rate:g}"] = _grid_cell(at_rate, task, tasks, star)
            rows.append(row)
    return rows


def _grid_cell(trials: Sequence[SearchRecord], task: str, tasks: Sequence[str], star: bool) -> Cell:
    found = [t for t in trials if task in (MEAN, t.task)]
    if not found or (task == MEAN and {t.task for t in found} != set(tasks)):
        return missing(UNTRIED)
    values = [100 * t.value for t in found if t.value is not None]
    if len(values) < len(found):
        return missing(DIVERGED)
    mean = fmean(values)
    numbers = {"": mean, "stderr": None, "n": sum(t.n for t in found), "chosen": int(star)}
    text = f"{mean:.1f}"
    errors = [100 * t.stderr for t in found if t.stderr is not None]
    if task != MEAN and errors:
        numbers["stderr"] = fmean(errors)
        text += f" ± {numbers['stderr']:.1f}"
    return Cell(f"{text} ★" if star else text, numbers, bold=star)


def selection_table(records: Mapping[Path, SelectionRecord]) -> Table:
    """Return the top-K share with the selection loss on and off, over seeds."""
    _check_unique(records, lambda r: (r.method, r.task, r.coefficient, _reduction(r)))
    require_comparable((path, _selection_facts(record)) for path, record in records.items())
    runs = list(records.values())
    rows = []
    for method, task in sorted({(r.method, r.task) for r in runs}):
        rows += _study_rows([r for r in runs if (r.method, r.task) == (method, task)])
    remarks = (
        f"Top-{runs[0].top_k} share of the routed experts' activity on held-out tokens, mean over "
        f"the adapted linears, after {runs[0].steps} steps. ± is one standard error over seeds; "
        "differences are on minus off, paired by seed, and in standard errors of the difference.",
    )
    return build("selection", "Expert selection loss, on and off", rows, remarks, keys=4)


def _study_rows(runs: Sequence[SelectionRecord]) -> list[Row]:
    groups: dict[tuple[float, str], list[SelectionRecord]] = {}
    for run in runs:
        groups.setdefault((run.coefficient, _reduction(run)), []).append(run)
    off = groups.get((0.0, "off"), [])
    return [_study_row(groups[key], off) for key in sorted(groups)]


def _reduction(record: SelectionRecord) -> str:
    return record.reduction if record.coefficient else "off"


def _study_row(runs: Sequence[SelectionRecord], off: Sequence[SelectionRecord]) -> Row:
    first = runs[0]
    ratios = [r.gradient_ratio for r in runs if r.gradient_ratio is not None]
    return {
        ("", "method"): label(first.method),
        ("", "task"): label(first.task),
        ("", "coefficient"): number(first.coefficient, "g"),
        ("", "reduction"): label(_reduction(first)),
        ("", "seeds"): number(len(runs)),
        ("top-K share, %", "mean"): _over_seeds([100 * r.top_k_share for r in runs], 2),
        ("top-K share, %", "on − off"): _on_minus_off(runs, off),
        ("", "final loss"): _over_seeds([r.final_loss for r in runs], 3),
        ("", "gradient ratio"): _over_seeds(ratios, 3) if ratios else missing(UNMEASURED),
    }


def _over_seeds(values: Sequence[float], digits: int) -> Cell:
    mean, error = fmean(values), standard_error(values)
    text = f"{mean:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
    return Cell(text, {"": mean, "stderr": error}, [ONE_SEED] * (error is None))


def _on_minus_off(runs: Sequence[SelectionRecord], off: Sequence[SelectionRecord]) -> Cell:
    if runs[0].coefficient == 0:
        return missing(OFF)
    if not off:
        return missing(NO_OFF)
    on_by_seed = {str(r.seed): 100 * r.top_k_share for r in runs}
    off_by_seed = {str(r.seed): 100 * r.top_k_share for r in off}
    if on_by_seed.keys() == off_by_seed.keys():
        difference = paired(on_by_seed, off_by_seed)
    else:
        difference = unpaired(list(on_by_seed.values()), list(off_by_seed.values()))
    notes = [] if difference.paired else [OTHER_SEEDS]
    text = f"{difference.value:+.2f}"
    if difference.stderr is None:
        notes.append(ONE_SEED)
    else:
        text += f" ± {difference.stderr:.2f}"
    if difference.z is not None:
        text += f" ({difference.z:+.1f} s.e.)"
    numbers = {"": difference.value, "stderr": difference.stderr, "in stderr": difference.z}
    return Cell(text, numbers, notes)


def _check_unique(records: Mapping[Path, S], cell: Callable[[S], Hashable]) -> None:
    seen: dict[Hashable, Path] = {}
    for path, record in records.items():
        other = seen.setdefault((cell(record), record.seed), path)
        if other != path:
            raise RecordError(f"{other} and {path} hold the same trial; keep one of them.")


def _search_facts(record: SearchRecord) -> Iterator[Fact]:
    yield from dtype_facts(record.config)
    yield "the metric", record.protocol, record.metric
    yield "the number of questions", record.task, record.n


def _selection_facts(record: SelectionRecord) -> Iterator[Fact]:
    yield from dtype_facts(record.config)
    yield "the number of active experts", "", record.top_k
    yield "the number of steps", "", record.steps
