"""Where suites lie, and how their YAML files are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from furina.errors import ConfigurationError, nearest

DEFAULTS = "defaults.yaml"
EXPERIMENTS = Path("experiments")
SHIPPED = Path(__file__).parents[2] / EXPERIMENTS
"""The suites of the checkout that this package is part of; an installed wheel has none."""
NO_SHIPPED = (
    f"The shipped suites lie in {EXPERIMENTS}/ of a checkout of furina, not in an installed "
    "package: run inside a checkout, or give a suite's folder."
)


def suite_folder(path: Path | str) -> Path:
    """Return the suite's folder, which may be given by its name in experiments/."""
    path = Path(path)
    parents = [folder for folder in (EXPERIMENTS, SHIPPED) if folder.is_dir()]
    named_so = [folder / path for folder in parents if (folder / path).is_dir()]
    known = path if path.exists() or not named_so else named_so[0]
    if (known / DEFAULTS).is_file():
        return known
    names = {file.parent.name for folder in parents for file in folder.glob(f"*/{DEFAULTS}")}
    raise ConfigurationError(
        f"There is no suite {path}, a folder with {DEFAULTS}."
        + (nearest(str(path), names) if names else f" {NO_SHIPPED}")
    )


def neighbour(suite: Path, name: str) -> Path:
    """Return a file beside the suite's folder; if there is none, that of the shipped suites."""
    own = suite.resolve().parent / name
    return next((f for f in (own, EXPERIMENTS / name, SHIPPED / name) if f.is_file()), own)


def missing_hint() -> str:
    """Return what else to say where a file of the suites is missing; "" inside a checkout."""
    return "" if SHIPPED.is_dir() else f" {NO_SHIPPED}"


def read(path: Path) -> dict[str, Any]:
    """Read a suite's file; raises ConfigurationError unless it holds options, and not `suite`."""
    if not path.is_file():
        hint = missing_hint() or " see the folders of experiments/."
        raise ConfigurationError(f"There is no suite file {path}:{hint}")
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
def located(path: Path) -> Iterator[None]:
    """Put the file's name before the message of a configuration error, once."""
    try:
        yield
    except ConfigurationError as error:
        if str(path) in str(error):
            raise
        raise ConfigurationError(f"{path}: {error}") from error
