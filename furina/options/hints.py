"""What the values of a config's options may be, read from their annotations."""

from __future__ import annotations

from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints


@cache
def choices(config: type) -> dict[str, tuple[Any, ...]]:
    """Return {option: allowed values} of the options that are a Literal."""
    hints = get_type_hints(config).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


@cache
def scalars(config: type) -> dict[str, tuple[type, ...]]:
    """Return {option: types} of the options that are one number or a switch."""
    hints = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(config).items()}
    return {
        name: kinds for name, kinds in hints.items() if {*kinds} <= {int, float, bool, NoneType}
    }


def is_of(value: object, kinds: tuple[type, ...]) -> bool:
    """Return whether a value is of one of these types; a whole number is a float too."""
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, (*kinds, int) if float in kinds else kinds)
