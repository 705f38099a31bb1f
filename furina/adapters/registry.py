"""The registered methods by name, and their configs made from plain options."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from furina.adapters.base import _REGISTRY, AdapterConfig, C
from furina.errors import ConfigurationError, nearest, suggestion
from furina.options.hints import in_words

_PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
}
"""What peft calls an option, and what it is called here."""


def methods() -> dict[str, type[AdapterConfig]]:
    """Return every registered method that is listed, by name."""
    return {name: config for name, config in sorted(_REGISTRY.items()) if config.listed}


def config_class(method: str, others: Sequence[str] = ()) -> type[AdapterConfig]:
    """Return a method's config, listed or not.

    Raises ConfigurationError for an unknown name, with the nearest of those listed and of `others`.
    """
    if method not in _REGISTRY:
        raise ConfigurationError(
            f"Unknown method {method!r}.{nearest(method, [*methods(), *others])}"
        )
    return _REGISTRY[method]


def configure(method: str, options: Mapping[str, Any]) -> AdapterConfig:
    """Make `method`'s config from plain options, checking names, types and values.

    Raises ConfigurationError for an unknown method or option (with the nearest right one) and for
    a value of the wrong type.
    """
    config = config_class(method)
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            near = suggestion(_PEFT_NAMES.get(option, option), [*known, "targets"])
            raise ConfigurationError(
                f"Method {method} has no option {option!r}.{near} "
                f"Known: {', '.join(sorted(known))}."
            )
    return _typed(config, options)


def _typed(config: type[C], options: Mapping[str, Any]) -> C:
    from jsonargparse import ArgumentError, ArgumentParser

    for option, hint in get_type_hints(config).items():
        if option in options and options[option] is None and NoneType not in get_args(hint):
            raise ConfigurationError(f"Method {config.name}: {option} cannot be empty (null).")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config, "options")
    try:
        parsed = parser.parse_object({"options": dict(options)})
    except ArgumentError as error:
        reason = " ".join(str(error).split())
        if wrong := re.match(r'Parser key "options\.(\w+)"', reason):
            hint, value = get_type_hints(config)[wrong[1]], options[wrong[1]]
            reason = f"{wrong[1]} must be {in_words(hint)}, not {value!r}."
        raise ConfigurationError(f"Method {config.name}: {reason}") from error
    return config(**parsed.options.as_dict())
