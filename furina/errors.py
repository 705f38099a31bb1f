"""Errors a user can act on: each message is one sentence saying what, where and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class FurinaError(Exception):
    """Base of every error the command line prints as one sentence, without a traceback."""


class ConfigurationError(FurinaError, ValueError):
    """An option, target or call does not fit the model or the other options."""


class AdapterFileError(FurinaError):
    """An adapter folder is missing, damaged, foreign or made for another backbone."""


class NotMergeableError(FurinaError):
    """The method has no fixed weight update, so there is nothing exact to merge."""


class DataError(FurinaError):
    """A benchmark's rows are missing, empty or damaged."""


class AssetError(FurinaError):
    """A model or data package is not cached, or could not be fetched and verified."""


def suggestion(name: str, options: Iterable[str], cutoff: float = 0.5) -> str:
    """Return " Did you mean 'x'?" for the nearest of `options`, nothing where none is near."""
    close = difflib.get_close_matches(name, sorted(options), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def nearest(name: str, options: Iterable[str]) -> str:
    """Return " Did you mean 'x'? Known: a, b." for an unknown `name`."""
    known = sorted(options)
    return f"{suggestion(name, known)} Known: {', '.join(known) or '(none)'}."


def require_same(what: str, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ConfigurationError naming each setting in which a checkpoint's `what` is another."""
    different = [key for key in {**saved, **own} if saved.get(key) != own.get(key)]
    if different:
        pairs = (f"{key}={saved.get(key)!r} and not {own.get(key)!r}" for key in different)
        raise ConfigurationError(
            f"The checkpoint is of another {what}, with {', '.join(pairs)}: resume with the same "
            "settings, or start without the checkpoint."
        )
