"""The registered methods, told without torch where that is not loaded yet.

A method's file holds its config beside its layer, whose import of torch takes seconds. To say that
an option is wrong the config is enough: here the files of `furina.adapters` are run without their
imports of torch, and without the statements that cannot do without.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

_PACKAGE = "furina.adapters"
_FOLDER = Path(__file__).parents[1] / "adapters"
_HEAVY = ("torch", "furina.kernels", "furina.reference")
"""What is not imported."""


def registry() -> Any:
    """Return what has the functions `methods` and `configure` of `furina.adapters`.

    It is that package where torch is loaded; else its configs can be made, checked and counted, but
    build no layers.
    """
    if "torch" not in sys.modules:
        with suppress(NameError):  # of what a config needs of torch
            return _without_torch()
    return importlib.import_module(_PACKAGE)


@cache
def _without_torch() -> ModuleType:
    for found in pkgutil.iter_modules([str(_FOLDER)]):
        if found.ispkg:
            raise NameError(f"{found.name} is a package, which is imported")
        _run(found.name)
    without_layers = _run("registry")
    for config in without_layers.methods().values():
        config()
    return without_layers


@cache
def _run(name: str) -> ModuleType:
    """Run the statements of a file of the package that need no torch, in a module of its own."""
    file = _FOLDER / f"{name}.py"
    module = ModuleType(f"{__name__}.{name}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where dataclasses and inspect look it up
    for statement in ast.parse(file.read_text(encoding="utf-8")).body:
        package, _, source = (getattr(statement, "module", None) or "").rpartition(".")
        if isinstance(statement, ast.ImportFrom) and package == _PACKAGE:
            names = {alias.asname or alias.name: alias.name for alias in statement.names}
            held = vars(_run(source))
            vars(module).update({own: held[name] for own, name in names.items() if name in held})
        elif any(f"{name}.".startswith(f"{_PACKAGE}.") for name in _imported(statement)):
            raise NameError(f"{file} imports {_PACKAGE} itself, and torch with it")
        elif not any(name.startswith(_HEAVY) for name in _imported(statement)):
            _execute(statement, module, file)
    return module


def _imported(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ImportFrom):
        return [f"{statement.module}.{alias.name}" for alias in statement.names]
    return [a.name for a in statement.names] if isinstance(statement, ast.Import) else []


def _execute(statement: ast.stmt, module: ModuleType, file: Path) -> None:
    code = compile(ast.Module([statement], []), str(file), "exec")  # with annotations as text
    try:
        exec(code, vars(module))
    except NameError:  # what it names was not imported
        decorators = map(ast.unparse, getattr(statement, "decorator_list", ()))
        if any(decorator.startswith("register(") for decorator in decorators):
            raise
