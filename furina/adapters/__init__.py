"""Every fine-tuning method, one file each; the files of this folder are the registry."""

from __future__ import annotations

import importlib
import pkgutil

from furina.adapters.base import (
    AdapterConfig,
    AdapterLinear,
    Mergeability,
    ParameterCount,
    register,
)
from furina.adapters.registry import config_class, configure, methods

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "AdapterConfig",
    "AdapterLinear",
    "Mergeability",
    "ParameterCount",
    "config_class",
    "configure",
    "methods",
    "register",
]
