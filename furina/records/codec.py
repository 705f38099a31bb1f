"""Strict JSON for frozen dataclasses: every key known, every value of the declared type."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, Self, TypeVar

from furina.errors import FurinaError, nearest
from furina.options.hints import in_words
from furina.storage import write_text

T = TypeVar("T")
LATER = "later"


class RecordError(FurinaError):
    """A result file is damaged, of another schema, or does not fit beside the others."""


def later(default: T) -> T:
    """Return a field that older files of the same schema lack, where it has this default."""
    made: T = dataclasses.field(default=default, metadata={LATER: True})
    return made


class Record:
    """A dataclass that is a JSON file, of a `schema` that its reader must be of too."""

    schema: int

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read one record; raises RecordError on unknown, missing or mistyped keys."""
        try:
            value = json.loads(Path(path).read_text("utf-8"), parse_constant=_refuse)
        except FileNotFoundError as error:
            raise RecordError(
                f"{path}: there is no such record; put it back, or run its suite again."
            ) from error
        except ValueError as error:
            raise RecordError(
                f"{path} is not valid JSON ({error}); delete it and run its cell again."
            ) from error
        if not isinstance(value, dict) or "schema" not in value:
            raise RecordError(f"{path} is not a furina record: it has no 'schema' key.")
        if value["schema"] != cls.schema:
            raise RecordError(
                f"{path} has schema {value['schema']!r} and this version of furina reads "
                f"{cls.schema}; run its cell again."
            )
        decoded: Self = decode(cls, value, str(path))
        return decoded

    def write(self, path: Path) -> None:
        """Write the record atomically; raises RecordError if it could not be read back."""
        decode(type(self), encode(self), str(path))
        write_text(path, self.text())

    def text(self) -> str:
        """Return what the file holds."""
        return dumps(encode(self)) + "\n"


def dumps(value: object) -> str:
    """Return indented JSON with each innermost list on one line (a curve point per line)."""
    text = json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False)
    return re.sub(r"\[\n\s+([^\[\]{}]*?)\n\s+\]", _one_line, text)


def _one_line(match: re.Match[str]) -> str:
    return "[" + re.sub(r",\n\s+", ", ", match[1]) + "]"


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def encode(value: object) -> Any:
    """Return dataclasses as dicts and tuples as lists, ready for JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as `kind`: a dataclass, scalar, tuple, dict, literal, optional or object."""
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        return decode(next(a for a in arguments if a is not types.NoneType), value, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise RecordError(f"{where} is {value!r}.{nearest(str(value), map(str, arguments))}")
    if origin is tuple and isinstance(value, list):
        return _decode_tuple(arguments, value, where)
    if origin is dict and isinstance(value, dict):
        return {
            str(key): decode(arguments[1], item, f"{where}: {key}") for key, item in value.items()
        }
    return _decode_scalar(kind, value, where)


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = field_types(kind)
    if not isinstance(value, dict):
        raise RecordError(f"{where} must be an object with the keys {', '.join(hints)}.")
    for key in value:
        if key not in hints:
            raise RecordError(f"{where}: unknown key {key!r}.{nearest(key, hints)}")
    added = {field.name for field in dataclasses.fields(kind) if LATER in field.metadata}
    missing = [name for name in hints if name not in value and name not in added]
    if missing:
        raise RecordError(f"{where}: missing key {', '.join(map(repr, missing))}.")
    return kind(**{name: decode(hints[name], value[name], f"{where}: {name}") for name in value})


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the resolved annotation of every field of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _decode_tuple(arguments: tuple[Any, ...], value: list[Any], where: str) -> tuple[Any, ...]:
    if arguments[-1] is Ellipsis:
        kinds = [arguments[0]] * len(value)
    elif len(arguments) == len(value):
        kinds = list(arguments)
    else:
        raise RecordError(f"{where} must hold {len(arguments)} values, not {len(value)}.")
    pairs = enumerate(zip(kinds, value, strict=True))
    return tuple(decode(kind, item, f"{where}[{i}]") for i, (kind, item) in pairs)


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where} is {value}; a record holds finite numbers or null.")
    if kind is object:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (str, int, float, bool) and type(value) is kind:
        return value
    raise RecordError(f"{where} must be {in_words(kind)}, not {value!r}.")
