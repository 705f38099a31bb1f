"""How options are shown and how a wrong value is named: in words, without Python's types."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import NonNegativeInt, PositiveInt

from furina.errors import nearest
from furina.options.hints import WORDS, in_words

_LIMITED = {
    PositiveInt: "a whole number of at least 1",
    NonNegativeInt: "a whole number of at least 0",
}
_METAVARS: dict[Any, str] = {bool: "{true,false}", int: "INT", float: "FLOAT", Path: "PATH"}
_WRONG_VALUE = re.compile(
    r'Parser key "(?P<key>[^"]+)"[^:]*:.*?(?:Got|Given) value: (?P<value>.*)$'
)
_WRONG_NUMBER = re.compile(
    r'Parser key "(?P<key>[^"]+)": Not of type \w+: '
    r"(?:invalid literal for int\(\) with base 10: '(?P<text>.*)'$|(?P<number>.*) does not conform)"
)


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The help text and the default of each option; examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").rstrip(".")
        if not hasattr(action, "_typehint") or action.required or not action.option_strings:
            return text
        return f"{text} [{_shown(action.default).replace('%', '%%')}]"


def _shown(default: Any) -> str:
    if isinstance(default, (list, tuple)):
        return ", ".join(map(str, default))
    if default is None or isinstance(default, bool):
        return str(default).lower()
    return str(default)


def metavar(hint: Any) -> str | None:
    """Return what stands for a value of type `hint` in the help; None where the type is enough."""
    kind = without_none(hint)
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if get_origin(kind) in (list, tuple, Sequence):
        return "'[A, B]'"
    if get_origin(kind) is dict:
        return "'{A: {…}}'"
    kinds = kind.__mro__ if isinstance(kind, type) else ()
    return next((_METAVARS[each] for each in kinds if each in _METAVARS), "TEXT")


def sentence(error: ArgumentError, parser: ArgumentParser) -> str:
    """Return the parser's complaint as one sentence: option, value and what is allowed."""
    text = " ".join(str(error).split())
    wrong = _WRONG_NUMBER.match(text) or _WRONG_VALUE.match(text)
    named = {action.dest: action for action in parser._actions}
    if not wrong or wrong["key"] not in named:
        return f"{parser.prog}: {text}" + ("" if text.endswith(".") else ".")
    action = named[wrong["key"]]
    hint = getattr(action, "_typehint", str)
    value = next(value for name, value in wrong.groupdict().items() if name != "key" and value)
    option = action.option_strings[0] if action.option_strings else action.dest
    kind = without_none(hint)
    if get_origin(kind) is Literal:
        return f"{option} cannot be {value!r}.{nearest(value, map(str, get_args(kind)))}"
    return f"{option} must be {in_words(hint, {**WORDS, **_LIMITED})}, not {value!r}."


def without_none(hint: Any) -> Any:
    """Return the type of an option's values other than null, where it is one."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if get_origin(hint) in (Union, UnionType) and len(kinds) == 1 else hint
