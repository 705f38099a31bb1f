"""What the values of a config's options may be, read from their annotations and said in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    NoneType: "null",
}


def in_words(hint: Any, words: Mapping[Any, str] = WORDS) -> str:
    """Say what a value of type `hint` is, without Python's names; `words` has those of scalars."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(in_words(each, words) for each in arguments)
    if kind is Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if kind in (list, tuple, Sequence):
        return "a list such as [a, b]"
    if kind in (dict, Mapping):
        return "a mapping such as {a: 1}"
    return words.get(kind, str(kind))


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
