"""Run every cell of a suite that has no record yet.

A suite is a folder: `defaults.yaml` for what all runs share, and beside it a YAML file per method.
Adding a method to a table is adding its file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from furina.errors import ConfigurationError, FurinaError, nearest
from furina.experiment.config import RunConfig
from furina.storage import sha256_file, write_text

Study = Literal["cells", "search", "selection"]
Point = dict[str, Any]
DEFAULTS = "defaults.yaml"


class FailedRunsError(FurinaError):
    """Some runs of a suite failed; the others have their records."""


@dataclass(frozen=True)
class Suite:
    """Runs that belong in one table.

    `study` is "cells" (fine-tune, score, merge, time), "search" (score on held-out train questions)
    or "selection" (expert selection on held-out train questions). `full` is whether all test
    questions are scored.
    """

    path: Path
    study: Study
    runs: tuple[RunConfig, ...] = field(repr=False)
    full: bool = False

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.path.resolve().name

    def command(self, config: RunConfig) -> str:
        """Return the command that runs one of its runs again."""
        words = ["furina", "reproduce", str(self.path), "--methods", config.method]
        return shlex.join(words + ["--full"] * self.full)


def read_suite(path: Path) -> Suite:
    """Read the suite in folder `path`.

    `defaults.yaml` holds the study, and RunConfig fields that each other file overrides. A `sweep`
    in either maps fields ("task", "adapter.rank") to lists of values, for all their combinations,
    or is a list of mappings from fields to values. What a file says itself, in its sweep or
    outside it, wins over the defaults' sweep. Raises ConfigurationError for anything unknown or
    missing.
    """
    path = Path(path)
    shared = dict(_read(path / DEFAULTS))
    study, sweep = shared.pop("study", "cells"), shared.pop("sweep", {})
    if study not in get_args(Study):
        known = nearest(str(study), get_args(Study))
        raise ConfigurationError(f"{path / DEFAULTS} has an unknown study {study!r}.{known}")
    with _located(path / DEFAULTS):
        if "adapter" in shared and "method" not in shared:
            raise ConfigurationError("options of an adapter belong where the method is named.")
        defaults = RunConfig().updated({"suite": path.resolve().name, **shared})
        shared_points = _points(sweep)
    runs: list[RunConfig] = []
    for file in sorted(path.glob("*.yaml")):
        if file.name != DEFAULTS:
            with _located(file):
                runs += _expand(defaults, shared_points, _read(file))
    if not runs:
        raise ConfigurationError(f"{path} holds no runs: add one YAML file per method.")
    _require_distinct(path, study, runs)
    return Suite(path, study, tuple(runs))


def reproduce(
    path: Path,
    *,
    methods: Sequence[str] = (),
    full: bool = False,
    results: Path = Path("results"),
    runs: Path = Path("runs"),
) -> list[Path]:
    """Run what has no record yet and return the records' files; `full` takes all test questions.

    A cell whose record is in the working folder is skipped; one that was killed goes on from its
    last checkpoint. Working files go to `runs`, records to `results`. A run that fails does not
    stop the others: it is reported at the end with FailedRunsError.
    """
    suite = read_suite(path)
    suite = _choose(suite, methods, full)
    files, failures = [], []
    for number, config in enumerate(suite.runs, start=1):
        print(f"[{number}/{len(suite.runs)}] {_title(config)}", flush=True)
        try:
            files.append(_run(suite, config, results, runs))
        except FurinaError as error:
            failures.append(f"{_title(config)}: {error}")
            print(f"  failed: {error}", flush=True)
    if failures:
        raise FailedRunsError(
            f"{len(failures)} of {len(suite.runs)} runs failed: {'; '.join(failures)}"
        )
    return files


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigurationError(f"There is no suite file {path}: see the folders of experiments/.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold options, one 'name: value' a line.")
    return content


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Put the file's name before the message of a configuration error."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from error


def _expand(defaults: RunConfig, shared: list[Point], content: dict[str, Any]) -> list[RunConfig]:
    own_points = _points(content.pop("sweep", {}))
    fixed = defaults.updated(content)
    said = {*content, *(f"adapter.{option}" for option in content.get("adapter", {}))}
    runs = [
        _with(fixed, {key: value for key, value in point.items() if key not in said} | own)
        for point, own in itertools.product(shared, own_points)
    ]
    for run in runs:
        run.check_tasks()
        run.adapter_config()
    return [run for index, run in enumerate(runs) if run not in runs[:index]]


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
        key = run.name, *(settings.get(name) for name in _VARIED[study])
        if key in seen:
            differ = f" that differ in none of: {', '.join(_VARIED[study])}" * bool(_VARIED[study])
            raise ConfigurationError(
                f"{path} has more than one run of {_title(run)}{differ}, and a table holds one: "
                "keep one, or move the others into a suite of their own."
            )
        seen.add(key)


def _with(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    prefix = "adapter."
    options = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    fields = {k: v for k, v in values.items() if not k.startswith(prefix)}
    return config.updated({**fields, "adapter": options})


def _choose(suite: Suite, methods: Sequence[str], full: bool) -> Suite:
    if full and suite.study != "cells":
        raise ConfigurationError(
            f"{suite.path} is a study of held-out train questions: --full would be ignored."
        )
    known = list(dict.fromkeys(run.method for run in suite.runs))
    for method in methods:
        if method not in known and method != "all":
            raise ConfigurationError(
                f"{suite.path} has no runs of method {method!r}.{nearest(method, [*known, 'all'])}"
            )
    wanted = known if not methods or "all" in methods else methods
    runs = [run for run in suite.runs if run.method in wanted]
    if full:
        runs = [run.updated({"test_size": None, "suite": f"{run.suite}-full"}) for run in runs]
    return replace(suite, runs=tuple(runs), full=full)


def _title(config: RunConfig) -> str:
    return f"{config.method} on {config.task}, seed {config.seed}"


def _run(suite: Suite, config: RunConfig, results: Path, runs: Path) -> Path:
    """Run one cell unless `runs` says it is finished; returns the record's file."""
    run_dir = runs / suite.name / _folder_name(config)
    done = run_dir / "record.sha256"
    if finished := _finished(done, results):
        print("  finished before: skipped", flush=True)
        return finished
    file = _STUDIES[suite.study](suite, config, run_dir, results)
    write_text(done, f"{sha256_file(file)}  {file.relative_to(results)}\n")
    return file


def _finished(done: Path, results: Path) -> Path | None:
    """Return the record that `done` names, if it is still this run's own and not a later one's."""
    if not done.exists():
        return None
    digest, name = done.read_text(encoding="utf-8").strip().split("  ", 1)
    file = results / name
    return file if file.exists() and sha256_file(file) == digest else None


def _folder_name(config: RunConfig) -> str:
    settings = json.dumps(config.to_dict(), sort_keys=True)
    return f"{config.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def _cell(suite: Suite, config: RunConfig, run_dir: Path, results: Path) -> Path:
    from furina.experiment.cell import run_cell

    return run_cell(config, run_dir, results / config.suite, suite.command(config))


def _search(suite: Suite, config: RunConfig, run_dir: Path, results: Path) -> Path:
    from furina.experiment.trials import search_trial

    record = search_trial(config, run_dir, suite.command(config))
    file = results / "search" / record.file_name
    record.write(file)
    return file


def _selection(suite: Suite, config: RunConfig, run_dir: Path, results: Path) -> Path:
    from furina.experiment.trials import selection_trial

    record = selection_trial(config, run_dir, suite.command(config))
    file = results / "selection" / record.file_name
    record.write(file)
    return file


_STUDIES: dict[str, Callable[[Suite, RunConfig, Path, Path], Path]] = {
    "cells": _cell,
    "search": _search,
    "selection": _selection,
}
