"""How tasks are asked, a file each: a module here that defines `PROTOCOL` or `PROTOCOLS`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from furina.data.protocols.base import (
    ChoiceProtocol,
    Decoding,
    GenerationProtocol,
    Judgement,
    Pair,
    Protocol,
)
from furina.errors import ConfigurationError, nearest

__all__ = [
    "ChoiceProtocol",
    "Decoding",
    "GenerationProtocol",
    "Judgement",
    "Pair",
    "Protocol",
    "get_protocol",
    "protocols",
]


@cache
def protocols() -> dict[str, Protocol]:
    """Return every protocol by name."""
    found: list[Protocol] = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += getattr(module, "PROTOCOLS", ())
        found += [module.PROTOCOL] if hasattr(module, "PROTOCOL") else []
    return {protocol.name: protocol for protocol in found}


def get_protocol(name: str) -> Protocol:
    """Return the protocol called `name`; raises ConfigurationError with the nearest known name."""
    if name not in protocols():
        raise ConfigurationError(f"There is no protocol {name!r}.{nearest(name, protocols())}")
    return protocols()[name]
