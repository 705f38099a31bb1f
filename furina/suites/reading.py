"""Read a suite: a folder of experiments/ with what all its runs share and a file per row.

Adding a row to a table is adding its file. A suite that has scales says in sections `cpu` and
`paper` what differs between them; `scales.yaml` beside the suites says what all suites share there,
and under `by_task` what a task of long prompts has instead. What a suite names and does not have
beside it is that of the shipped suites.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

from furina.data.tasks import get_task
from furina.errors import ConfigurationError, nearest
from furina.experiment.config import RunConfig
from furina.suites.files import DEFAULTS, located, missing_hint, neighbour, read, suite_folder
from furina.suites.suite import Scale, Study, Suite, named

SCALES: tuple[Scale, ...] = get_args(Scale)
SHARED = "scales.yaml"
ADAPTER = "adapter."
"""How the name of an adapter's option begins."""


class Given(NamedTuple):
    """The value of an option, and the file and section that give it."""

    value: Any
    origin: str


Options = dict[str, Given]
"""By name, as in "steps" and "adapter.rank"."""


class Content(NamedTuple):
    """What a file says at a scale: options, and sweeps with the points of each."""

    options: Options
    sweeps: list[list[Options]]


class Resolved(NamedTuple):
    """A run as far as it has been read, and what gave each of its values."""

    run: RunConfig
    origins: dict[str, str]

    def updated(self, options: Options) -> Resolved:
        """Return the run with further options, which win."""
        origins = {name: given.origin for name, given in options.items()}
        fields = {name: given.value for name, given in options.items()}
        adapter = {
            name.removeprefix(ADAPTER): fields.pop(name)
            for name in options
            if name.startswith(ADAPTER)
        }
        return Resolved(self.run.updated({"adapter": adapter, **fields}), self.origins | origins)


def read_suite(
    path: Path | str,
    scale: Scale | None = None,
    rows: Sequence[str] = (),
    tasks: Sequence[str] = (),
    seeds: int | None = None,
    full: bool = False,
) -> Suite:
    """Read a suite: a folder, or the name of one in experiments/.

    `defaults.yaml` holds the study and RunConfig fields, which each other file, one per row,
    overrides; sections `cpu` and `paper` in either hold at that scale only, and come after what
    stands outside them. `like: SUITE/ROW` starts from another row's file. A `sweep` maps fields
    ("task", "adapter.rank") to lists of values, for all their combinations, or is a list of
    mappings from fields to values. What a file says itself, in its sweep or outside it, wins over
    the defaults' sweep. A suite with scales is read at `cpu` if none is named. Of `rows`, `tasks`,
    `seeds` and `full` see `Suite.chosen`; rows that are not asked for may be wrong.

    Raises ConfigurationError for anything unknown or missing.
    """
    path = suite_folder(path)
    content = read(path / DEFAULTS)
    with located(path / DEFAULTS):
        scale = _scale(path, content, scale)
        own = _at_scale(path / DEFAULTS, content, scale)
        study = own.options.pop("study", Given("cells", "")).value
        if study not in get_args(Study):
            raise ConfigurationError(
                f"unknown study {study!r}.{nearest(str(study), get_args(Study))}"
            )
        if "method" not in own.options and any(n.startswith("adapter") for n in own.options):
            raise ConfigurationError("options of an adapter belong where the method is named.")
    start, sweeps, by_task = _of_all_suites(path, scale)
    with located(path / DEFAULTS):
        name = {"suite": Given(named(path, scale), "the suite's name")}
        defaults = start.updated(name | own.options)
        points = _combined([*sweeps, *own.sweeps])
        by_task = {task: _without(values, own.options) for task, values in by_task.items()}
    files = [file for file in sorted(path.glob("*.yaml")) if file.name != DEFAULTS]
    if not files:
        raise ConfigurationError(f"{path} holds no runs: add one YAML file per row.")
    made: dict[Path, list[Resolved]] = {}
    for file in _needed(files, rows, scale):
        with located(file):
            made[file] = _expand(defaults, points, by_task, file, scale)
    resolved = _apart_by_backbone([each for own in made.values() for each in own])
    runs, origins = tuple(each.run for each in resolved), tuple(each.origins for each in resolved)
    suite = Suite(path, study, runs, origins, scale).chosen(rows, tasks, seeds, full)
    for file, expanded in made.items():  # last, for it takes seconds to import what checks them
        with located(file):
            for each in expanded:
                each.run.adapter_config()
    _require_distinct(path, study, runs)
    return suite


def _needed(files: list[Path], rows: Sequence[str], scale: Scale | None) -> list[Path]:
    """Return the files of these rows; all where none is named, or one that no file names."""
    if not rows:
        return files
    names = {file: _names(file, scale) for file in files}
    is_known = set(rows) <= set().union(*names.values())
    return [file for file in files if not is_known or names[file] & set(rows)]


def _names(file: Path, scale: Scale | None) -> set[str]:
    """Return what a file may call its rows, without the row that it is like."""
    try:
        options, sweeps = _at_scale(file, read(file), scale)
    except ConfigurationError:  # said where the row is asked for
        return {file.stem}
    rows = [(options | point).get("row") for point in _combined(sweeps)]
    return {str(row.value) if row and row.value else file.stem for row in rows}


def _scale(path: Path, content: dict[str, Any], wanted: Scale | None) -> Scale | None:
    """Return the scale at which a suite is read, None for one without."""
    known = [scale for scale in SCALES if scale in content]
    if not known and wanted:
        raise ConfigurationError(f"{path} has one scale only: leave out --scale {wanted}.")
    if known and (wanted or "cpu") not in known:
        raise ConfigurationError(f"{path} has no scale {wanted or 'cpu'}: {', '.join(known)}.")
    return (wanted or "cpu") if known else None


def _of_all_suites(
    path: Path, scale: Scale | None
) -> tuple[Resolved, list[list[Options]], dict[str, Options]]:
    """Return what all suites of a scale share, from the file beside their folders.

    It is the run that all start from, the sweeps, and by task what that task has instead.
    """
    start = Resolved(RunConfig(), {})
    if scale is None:
        return start, [], {}
    file = neighbour(path, SHARED)
    with located(file):
        options, sweeps = _at_scale(file, read(file), scale)
        by_task = options.pop("by_task", Given({}, "")).value
        start = start.updated(options)
        if not isinstance(by_task, dict) or not all(isinstance(v, dict) for v in by_task.values()):
            raise ConfigurationError("by_task must map tasks to options.")
        instead = {}
        for task, values in by_task.items():
            get_task(task)
            instead[task] = _options(values, f"{SHARED}, {scale}, by_task")
            start.updated(instead[task])
    return start, sweeps, instead


def _at_scale(file: Path, content: dict[str, Any], scale: Scale | None) -> Content:
    """Return what a file says at a scale: outside the sections, and over that in its own."""
    folder = file.resolve().parent.name
    name = file.name if file.name == SHARED else f"{folder}/{file.name}"
    found = _content({k: v for k, v in content.items() if k not in SCALES}, name)
    section = content.get(scale) if scale else None
    if section is None:
        return found
    if not isinstance(section, dict):
        raise ConfigurationError(f"{scale} must hold options, one 'name: value' a line.")
    own = _content(section, f"{name}, {scale}")
    return Content(_over(found.options, own.options), found.sweeps + own.sweeps)


def _content(content: dict[str, Any], origin: str) -> Content:
    """Return options and sweeps of a file or a section."""
    options = {name: value for name, value in content.items() if name != "sweep"}
    sweeps = [_points(content["sweep"], f"{origin}, sweep")] if "sweep" in content else []
    return Content(_options(options, origin), sweeps)


def _options(content: dict[str, Any], origin: str) -> Options:
    adapter = content.get("adapter")
    if isinstance(adapter, dict):
        own = {f"{ADAPTER}{name}": value for name, value in adapter.items()}
        content = {name: value for name, value in content.items() if name != "adapter"} | own
    return {name: Given(value, origin) for name, value in content.items()}


def _over(below: Options, above: Options) -> Options:
    """Return options with others over them; another method drops those of the first's adapter."""
    if "method" in above and below.get("method", above["method"]).value != above["method"].value:
        below = {name: given for name, given in below.items() if not name.startswith(ADAPTER)}
    return {**below, **above}


def _row(file: Path, scale: Scale | None, seen: tuple[Path, ...] = ()) -> Content:
    """Return a row's options at a scale, over those of the row that it says it is like."""
    content = read(file)
    if scale is None and not seen and (idle := [name for name in SCALES if name in content]):
        raise ConfigurationError(f"section {idle[0]} has no effect: the suite has one scale only.")
    own = _at_scale(file, content, scale)
    like = own.options.pop("like", None)
    if like is None:
        return own
    other = neighbour(file.parent, f"{like.value}.yaml")
    if other in seen or not other.is_file():
        raise ConfigurationError(
            f"like: {like.value} must name another row as SUITE/ROW; see {other}.{missing_hint()}"
        )
    below = _row(other, scale, (*seen, file))
    return Content(_over(below.options, own.options), own.sweeps or below.sweeps)


def _expand(
    defaults: Resolved,
    points: list[Options],
    by_task: dict[str, Options],
    file: Path,
    scale: Scale | None,
) -> list[Resolved]:
    """Return a row's runs; what a task has instead gives way to what the suite or the row says."""
    options, sweeps = _row(file, scale)
    fixed = defaults.updated(options)
    made: list[Resolved] = []
    for point, own in itertools.product(points, _combined(sweeps)):
        swept = _without(point, options) | own
        each = fixed.updated(swept)
        instead = _without(by_task.get(each.run.task, {}), {**options, **swept})
        each = _called(each.updated(instead), file)
        each.run.check_tasks()
        if all(each.run != other.run for other in made):
            made.append(each)
    return made


def _without(options: Options, names: Container[str]) -> Options:
    return {name: given for name, given in options.items() if name not in names}


def _called(each: Resolved, file: Path) -> Resolved:
    """Return the run with its row, which is the method's where it says nothing more."""
    row = each.run.row or file.stem
    origin = each.origins.get("row", "the file's name")
    return each.updated({"row": Given("" if row == each.run.method else row, origin)})


def _combined(sweeps: list[list[Options]]) -> list[Options]:
    """Return all combinations of the sweeps' points; a later sweep wins over an earlier one."""
    combinations = itertools.product(*sweeps)
    return [{name: p[name] for p in points for name in p} for points in combinations]


def _points(sweep: object, origin: str) -> list[Options]:
    """Return the points of a sweep: all combinations of a mapping's lists, or a list as it is."""
    if isinstance(sweep, dict) and all(v and isinstance(v, list) for v in sweep.values()):
        combinations = itertools.product(*sweep.values())
        sweep = [dict(zip(sweep, values, strict=True)) for values in combinations]
    if isinstance(sweep, list) and sweep and all(isinstance(point, dict) for point in sweep):
        return [_options(point, origin) for point in sweep]
    raise ConfigurationError(
        "sweep must map fields to lists of values, or be a list of mappings from fields to values."
    )


def _apart_by_backbone(found: list[Resolved]) -> list[Resolved]:
    """Give each of several backbones a suite of its own: one table has one backbone."""
    if len({each.run.backbone for each in found}) == 1:
        return found
    made = []
    for each in found:
        suite = f"{each.run.suite}-{Path(each.run.backbone).name.lower()}"
        made.append(each.updated({"suite": Given(suite, "the names of suite and backbone")}))
    return made


_VARIED: dict[Study, tuple[str, ...]] = {
    "cells": (),
    "search": ("protocol", "learning_rate", "steps", "adapter.magnitude_lr_multiplier"),
    "selection": ("adapter.selection_reduction", "adapter.selection_coefficient"),
}
"""What runs of one method, task and seed may differ in: the names of their records hold it."""


def _require_distinct(path: Path, study: Study, runs: Sequence[RunConfig]) -> None:
    """Refuse two runs whose records would bear the same name."""
    seen: set[tuple[object, ...]] = set()
    for run in runs:
        adapter = run.adapter_config()
        options = adapter.to_dict() if adapter else {}
        settings = run.to_dict() | {f"{ADAPTER}{name}": v for name, v in options.items()}
        # A study's records are named by the method, and know no rows.
        name = run.name if study == "cells" else (run.method, run.task, run.seed)
        key = run.suite, name, *(settings.get(field) for field in _VARIED[study])
        if key in seen:
            differ = f" that differ in none of: {', '.join(_VARIED[study])}" * bool(_VARIED[study])
            raise ConfigurationError(
                f"{path} has more than one run of {run.title}{differ}, and a table holds one: "
                "keep one, or give the others a row of their own."
            )
        seen.add(key)
