"""Read a suite: a folder of experiments/ with what all its runs share and a file per row.

Adding a row to a table is adding its file. A suite that has scales says in sections `cpu` and
`paper` what differs between them; `scales.yaml` beside the suites says what all suites share there,
and under `by_task` what a task of long prompts has instead. What a suite names and does not have
beside it is that of the shipped suites.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import yaml

from furina.data.tasks import get_task
from furina.errors import ConfigurationError, nearest
from furina.experiment.config import RunConfig
from furina.suites.suites import EXPERIMENTS, SHIPPED, Scale, Study, Suite, named, title

Point = dict[str, Any]
SCALES: tuple[Scale, ...] = get_args(Scale)
DEFAULTS = "defaults.yaml"
SHARED = "scales.yaml"


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
    path = _folder(path)
    content = _read(path / DEFAULTS)
    with _located(path / DEFAULTS):
        scale = _scale(path, content, scale)
        shared = _at_scale(content, scale)
        study, sweeps = shared.pop("study", "cells"), shared.pop("sweeps")
        if study not in get_args(Study):
            raise ConfigurationError(
                f"unknown study {study!r}.{nearest(str(study), get_args(Study))}"
            )
        if "adapter" in shared and "method" not in shared:
            raise ConfigurationError("options of an adapter belong where the method is named.")
    start, sweeps_of_all, by_task = _of_all_suites(path, scale)
    with _located(path / DEFAULTS):
        points = _combined([*sweeps_of_all, *sweeps])
        defaults = start.updated({"suite": named(path, scale), **shared})
        by_task = {task: _without(values, shared) for task, values in by_task.items()}
    files = [file for file in sorted(path.glob("*.yaml")) if file.name != DEFAULTS]
    made: dict[Path, list[RunConfig]] = {}
    for file in _asked_for(files, rows, scale):
        with _located(file):
            made[file] = _expand(defaults, points, by_task, file, scale)
    if not files:
        raise ConfigurationError(f"{path} holds no runs: add one YAML file per row.")
    runs = _apart_by_backbone([run for own in made.values() for run in own])
    suite = Suite(path, study, tuple(runs), scale).chosen(rows, tasks, seeds, full)
    for file, own in made.items():  # last, for it takes seconds to import what checks them
        with _located(file):
            for run in own:
                run.adapter_config()
    _require_distinct(path, study, runs)
    return suite


def _asked_for(files: list[Path], rows: Sequence[str], scale: Scale | None) -> list[Path]:
    """Return the files of these rows; all where none is named, or one that no file names."""
    names = {file: _names(file, scale) for file in files}
    is_known = set(rows) <= {name for own in names.values() for name in own}
    return [file for file in files if not is_known or names[file] & set(rows)] if rows else files


def _names(file: Path, scale: Scale | None) -> set[str]:
    """Return what a file may call its rows, without the row that it is like."""
    try:
        content = _at_scale(_read(file), scale)
        points = _combined(content["sweeps"])
    except ConfigurationError:  # said where the row is asked for
        return {file.stem}
    return {str(point.get("row") or content.get("row") or file.stem) for point in points}


def _folder(path: Path | str) -> Path:
    """Return the suite's folder, which may be given by its name in experiments/."""
    path = Path(path)
    places = [folder for folder in (EXPERIMENTS, SHIPPED) if folder.is_dir()]
    known = (
        path
        if path.exists()
        else next((folder / path for folder in places if (folder / path).is_dir()), path)
    )
    if (known / DEFAULTS).is_file():
        return known
    names = {file.parent.name for folder in places for file in folder.glob(f"*/{DEFAULTS}")}
    raise ConfigurationError(
        f"There is no suite {path}, a folder with {DEFAULTS}."
        + (nearest(str(path), names) if names else f" {_NO_SHIPPED}")
    )


_NO_SHIPPED = (
    f"The shipped suites lie in {EXPERIMENTS}/ of a checkout of furina, not in an installed "
    "package: run inside a checkout, or give a suite's folder."
)


def _beside(suite: Path, name: str) -> Path:
    """Return a file of the suite's neighbours, or where they have none of the shipped suites."""
    own = suite.resolve().parent / name
    places = (own, EXPERIMENTS / name, SHIPPED / name)
    return next((place for place in places if place.is_file()), own)


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
) -> tuple[RunConfig, list[object], dict[str, Point]]:
    """Return what all suites of a scale share, from the file beside their folders.

    It is the run that all start from, the sweeps, and by task what that task has instead.
    """
    if scale is None:
        return RunConfig(), [], {}
    file = _beside(path, SHARED)
    with _located(file):
        content = _at_scale(_read(file), scale)
        sweeps, by_task = content.pop("sweeps"), content.pop("by_task", {})
        start = RunConfig().updated(content)
        if not isinstance(by_task, dict) or not all(isinstance(v, dict) for v in by_task.values()):
            raise ConfigurationError("by_task must map tasks to options.")
        for task, values in by_task.items():
            get_task(task)
            start.updated(values)
    return start, sweeps, by_task


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        hint = "see the folders of experiments/." if SHIPPED.is_dir() else _NO_SHIPPED
        raise ConfigurationError(f"There is no suite file {path}: {hint}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold options, one 'name: value' a line.")
    if "suite" in content:
        raise ConfigurationError(f"{path}: leave out suite; it is the folder's name.")
    return content


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Put the file's name before the message of a configuration error, once."""
    try:
        yield
    except ConfigurationError as error:
        if str(path) in str(error):
            raise
        raise ConfigurationError(f"{path}: {error}") from error


def _at_scale(content: dict[str, Any], scale: Scale | None) -> dict[str, Any]:
    """Return a file's options at a scale, with its sweeps as a list under `sweeps`."""
    content = dict(content)
    sections = {name: content.pop(name, None) for name in SCALES}
    sweeps = [content.pop("sweep")] if "sweep" in content else []
    own = sections[scale] if scale else None
    if own is not None:
        if not isinstance(own, dict):
            raise ConfigurationError(f"{scale} must hold options, one 'name: value' a line.")
        own = dict(own)
        sweeps += [own.pop("sweep")] if "sweep" in own else []
        content = _over(content, own)
    return {**content, "sweeps": sweeps}


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return options with others over them; those of an adapter are merged if the method stays."""
    merged = {**below, **above}
    adapters = [options.get("adapter") for options in (below, above)]
    if above.get("method", below.get("method")) == below.get("method") and all(
        isinstance(adapter, dict) for adapter in adapters
    ):
        merged["adapter"] = {**below["adapter"], **above["adapter"]}
    return merged


def _row(file: Path, scale: Scale | None, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return a row's options at a scale, over those of the row that it says it is like."""
    content = _read(file)
    if scale is None and not seen and (idle := [name for name in SCALES if name in content]):
        raise ConfigurationError(f"section {idle[0]} has no effect: the suite has one scale only.")
    content = _at_scale(content, scale)
    like = content.pop("like", None)
    if like is None:
        return content
    other = _beside(file.parent, f"{like}.yaml")
    if other in seen or not other.is_file():
        hint = "" if SHIPPED.is_dir() else f" {_NO_SHIPPED}"
        raise ConfigurationError(
            f"like: {like} must name another row as SUITE/ROW; see {other}.{hint}"
        )
    below = _row(other, scale, (*seen, file))
    sweeps = content["sweeps"] or below["sweeps"]
    return {**_over(below, content), "sweeps": sweeps}


def _expand(
    defaults: RunConfig,
    shared: list[Point],
    by_task: dict[str, Point],
    file: Path,
    scale: Scale | None,
) -> list[RunConfig]:
    """Return a row's runs; what a task has instead gives way to what the suite or the row says."""
    content = _row(file, scale)
    own_points = _combined(content.pop("sweeps"))
    fixed = defaults.updated(content)
    said = {*content, *(f"adapter.{option}" for option in content.get("adapter", {}))}
    runs = list[RunConfig]()
    for point, own in itertools.product(shared, own_points):
        values = _without(point, said) | own
        run = _with(fixed, values)
        instead = _without(by_task.get(run.task, {}), said | values.keys())
        runs.append(run.updated(instead))
    runs = [_called(run, file.stem) for run in runs]
    for run in runs:
        run.check_tasks()
    return [run for index, run in enumerate(runs) if run not in runs[:index]]


def _without(point: Point, names: Container[str]) -> Point:
    return {name: value for name, value in point.items() if name not in names}


def _called(run: RunConfig, row: str) -> RunConfig:
    """Return the run with its row, which is the method's where it says nothing more."""
    row = run.row or row
    return run.updated({"row": "" if row == run.method else row})


def _combined(sweeps: list[object]) -> list[Point]:
    """Return all combinations of the sweeps' points; a later sweep wins over an earlier one."""
    points: list[Point] = [{}]
    for sweep in sweeps:
        points = [{**point, **other} for point in points for other in _points(sweep)]
    return points


def _points(sweep: object) -> list[Point]:
    """Return the points of a sweep: all combinations of a mapping's lists, or a list as it is."""
    if isinstance(sweep, list) and sweep and all(isinstance(point, dict) for point in sweep):
        return sweep
    if not isinstance(sweep, dict) or not all(v and isinstance(v, list) for v in sweep.values()):
        raise ConfigurationError(
            "sweep must map fields to lists of values, or be a list of mappings from fields to "
            "values."
        )
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _with(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    prefix = "adapter."
    options = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    fields = {k: v for k, v in values.items() if not k.startswith(prefix)}
    return config.updated({**fields, "adapter": options})


def _apart_by_backbone(runs: list[RunConfig]) -> list[RunConfig]:
    """Give each of several backbones a folder of records of its own: one table has one backbone."""
    if len({run.backbone for run in runs}) == 1:
        return runs
    return [
        run.updated({"suite": f"{run.suite}-{Path(run.backbone).name.lower()}"}) for run in runs
    ]


_VARIED: dict[Study, tuple[str, ...]] = {
    "cells": (),
    "search": ("protocol", "learning_rate", "steps", "adapter.magnitude_lr_multiplier"),
    "selection": ("adapter.selection_reduction", "adapter.selection_coefficient"),
}
"""What runs of one method, task and seed may differ in: the names of their records hold it."""


def _require_distinct(path: Path, study: Study, runs: list[RunConfig]) -> None:
    """Refuse two runs whose records would bear the same name."""
    seen: set[tuple[object, ...]] = set()
    for run in runs:
        adapter = run.adapter_config()
        settings = run.to_dict() | {
            f"adapter.{name}": value
            for name, value in (adapter.to_dict() if adapter else {}).items()
        }
        # A study's records are named by the method, and know no rows.
        name = run.name if study == "cells" else (run.method, run.task, run.seed)
        key = run.suite, name, *(settings.get(field) for field in _VARIED[study])
        if key in seen:
            differ = f" that differ in none of: {', '.join(_VARIED[study])}" * bool(_VARIED[study])
            raise ConfigurationError(
                f"{path} has more than one run of {title(run)}{differ}, and a table holds one: "
                "keep one, or give the others a row of their own."
            )
        seen.add(key)
