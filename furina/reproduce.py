"""Run every cell of a suite that has no record yet.

A suite is a folder: `defaults.yaml` for what all runs share, and beside it one YAML file per method.
Adding a method to a table is adding its file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from furina.errors import ConfigurationError, FurinaError, nearest
from furina.experiment.config import RunConfig
from furina.storage import write_text

Study = Literal["cells", "search", "selection"]
Sweep = dict[str, list[Any]] | list[dict[str, Any]]
DEFAULTS = "defaults.yaml"


@dataclass(frozen=True)
class Suite:
    """Runs that belong in one table.

    `study` is "cells" (fine-tune, score, merge, time), "search" (score on held-out train questions)
    or "selection" (expert selection on held-out train questions).
    """

    path: Path
    study: Study
    runs: tuple[RunConfig, ...] = field(repr=False)

    def command(self, config: RunConfig) -> str:
        """Return the command that runs one of its runs again."""
        return shlex.join(["furina", "reproduce", str(self.path), "--methods", config.method])


def read_suite(path: Path) -> Suite:
    """Read the suite in folder `path`.

    `defaults.yaml` holds the study, and RunConfig fields that each other file overrides. A `sweep`
    in either maps fields ("task", "adapter.rank") to lists of values, for all their combinations,
    or is a list of mappings from fields to values. A file's own sweep wins over the defaults'.
    Raises ConfigurationError for anything unknown or missing.
    """
    path = Path(path)
    shared = dict(_read(path / DEFAULTS))
    study, sweep = shared.pop("study", "cells"), shared.pop("sweep", {})
    if study not in get_args(Study):
        known = nearest(str(study), get_args(Study))
        raise ConfigurationError(f"{path / DEFAULTS} has an unknown study {study!r}.{known}")
    with _located(path / DEFAULTS):
        defaults = RunConfig().updated({"suite": path.name, **shared})
    runs: list[RunConfig] = []
    for file in sorted(path.glob("*.yaml")):
        if file.name != DEFAULTS:
            with _located(file):
                runs += _expand(defaults, sweep, _read(file))
    if not runs:
        raise ConfigurationError(f"{path} holds no runs: add one YAML file per method.")
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
    stop the others: it is reported at the end with FurinaError.
    """
    suite = read_suite(path)
    chosen = _choose(suite, methods, full)
    files, failures = [], []
    for number, config in enumerate(chosen, start=1):
        print(f"[{number}/{len(chosen)}] {_title(config)}", flush=True)
        try:
            files.append(_run(suite, config, results, runs))
        except FurinaError as error:
            failures.append(f"{_title(config)}: {error}")
            print(f"  failed: {error}", flush=True)
    if failures:
        raise FurinaError(f"{len(failures)} of {len(chosen)} runs failed: {'; '.join(failures)}")
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


def _expand(defaults: RunConfig, shared_sweep: Sweep, content: dict[str, Any]) -> list[RunConfig]:
    own_points = _points(content.pop("sweep", {}))
    fixed = defaults.updated(content)
    runs = [
        _with(fixed, {**shared, **own})
        for shared, own in itertools.product(_points(shared_sweep), own_points)
    ]
    return [run for index, run in enumerate(runs) if run not in runs[:index]]


def _points(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the points of a sweep: all combinations of a mapping's lists, or a list as it is."""
    if isinstance(sweep, list):
        return sweep
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _with(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    prefix = "adapter."
    options = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    fields = {k: v for k, v in values.items() if not k.startswith(prefix)}
    return config.updated({**fields, "adapter": options})


def _choose(suite: Suite, methods: Sequence[str], full: bool) -> list[RunConfig]:
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
    return runs


def _title(config: RunConfig) -> str:
    return f"{config.method} on {config.task}, seed {config.seed}"


def _run(suite: Suite, config: RunConfig, results: Path, runs: Path) -> Path:
    """Run one cell unless `runs` says it is finished; returns the record's file."""
    run_dir = runs / suite.path.name / _folder_name(config)
    done = run_dir / "record.txt"
    if done.exists() and (results / done.read_text(encoding="utf-8").strip()).exists():
        print("  finished before: skipped", flush=True)
        return results / done.read_text(encoding="utf-8").strip()
    file = _STUDIES[suite.study](suite, config, run_dir, results)
    write_text(done, f"{file.relative_to(results)}\n")
    return file


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
