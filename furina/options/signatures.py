"""Which methods there are and which options they take, read from their files as text.

A method's config stands beside its layer, and to import that takes seconds: a misspelt name or
option is told before.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

FOLDER = Path(__file__).parents[1] / "adapters"


class Option(NamedTuple):
    """An option of a method: its type, its default and the docstring of its field."""

    hint: Any
    default: Any
    help: str


WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    type(None): "null",
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


def method_names() -> list[str]:
    """Return the name of every method: those of the folder, and what was registered besides."""
    loaded = sys.modules.get("furina.adapters.base")
    return sorted({*_registered(), *getattr(loaded, "_REGISTRY", ())})


def method_options(method: str) -> dict[str, Option] | None:
    """Return a method's options by name in the order of its config's fields.

    None where the file does not write them plainly, or there is none: its class must be asked.
    """
    return _options(_registered()[method]) if method in _registered() else None


@cache
def _classes() -> dict[str, ast.ClassDef]:
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.py"))]
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name: node for node in nodes}


@cache
def _registered() -> dict[str, ast.ClassDef]:
    """Return the class that `@register("name")` stands above, by that name."""
    return {
        call.args[0].value: node
        for node in _classes().values()
        for call in node.decorator_list
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "register"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }


def _options(node: ast.ClassDef) -> dict[str, Option] | None:
    """Return a class's fields after those of its bases; None where one is not written plainly."""
    options: dict[str, Option] = {}
    for base in node.bases:
        inherited = _classes().get(ast.unparse(base))
        options |= (inherited and _options(inherited)) or {}
    for field, following in pairwise([*node.body, ast.Pass()]):
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        try:
            hint = eval(ast.unparse(field.annotation), {"Literal": Literal})
            default = ast.literal_eval(field.value) if field.value else None
        except (NameError, ValueError):
            return None
        text = following.value if isinstance(following, ast.Expr) else None
        lines = str(text.value).split() if isinstance(text, ast.Constant) else []
        options[ast.unparse(field.target)] = Option(hint, default, " ".join(lines))
    return options
