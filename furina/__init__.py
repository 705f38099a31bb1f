"""FURINA: a router-free mixture of LoRA experts that merges into its backbone, and its baselines.

model = furina.adapt(model, "furina", rank=16, num_experts=8)
...                                  # train model; add furina.auxiliary_loss(model)
furina.save(model, "adapter")        # config + safetensors
furina.merge(model)                  # a plain model again, at zero extra cost
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from furina.accumulation import accumulating as accumulating
    from furina.adapter_sets import AdapterSet as AdapterSet
    from furina.adapters import configure as configure
    from furina.adapters import methods as methods
    from furina.auxiliary import auxiliary_loss as auxiliary_loss
    from furina.auxiliary import auxiliary_tokens as auxiliary_tokens
    from furina.auxiliary import record_selection as record_selection
    from furina.backbones import load_backbone as load_backbone
    from furina.backbones import load_tokenizer as load_tokenizer
    from furina.checkpoint import load as load
    from furina.checkpoint import save as save
    from furina.data.module import TaskDataModule as TaskDataModule
    from furina.export import export_merged as export_merged
    from furina.export import export_peft as export_peft
    from furina.inject import adapt as adapt
    from furina.inject import adapter_parameters as adapter_parameters
    from furina.inject import adapter_state_dict as adapter_state_dict
    from furina.inject import describe as describe
    from furina.inject import is_adapted as is_adapted
    from furina.inject import load_adapter_state_dict as load_adapter_state_dict
    from furina.inject import parameter_groups as parameter_groups
    from furina.inject import remove as remove
    from furina.merging import is_merged as is_merged
    from furina.merging import merge as merge
    from furina.merging import unmerge as unmerge
    from furina.mode import evaluation_mode as evaluation_mode
    from furina.training.module import FinetuneModule as FinetuneModule

__version__ = "0.1.0"

_HOME = {
    "accumulation": ("accumulating",),
    "adapter_sets": ("AdapterSet",),
    "adapters": ("configure", "methods"),
    "auxiliary": ("after_step", "auxiliary_loss", "auxiliary_tokens", "record_selection"),
    "backbones": ("load_backbone", "load_tokenizer"),
    "checkpoint": ("load", "save"),
    "control": ("without_router",),
    "data.module": ("TaskDataModule",),
    "export": ("export_merged", "export_peft"),
    "inject": (
        "adapt",
        "adapter_parameters",
        "adapter_state_dict",
        "describe",
        "is_adapted",
        "load_adapter_state_dict",
        "parameter_groups",
        "remove",
    ),
    "merging": ("is_merged", "merge", "unmerge"),
    "mode": ("evaluation_mode",),
    "training.module": ("FinetuneModule",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used: `furina --help` needs no torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'furina' has no attribute {name!r}")
    return getattr(importlib.import_module(f"furina.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
