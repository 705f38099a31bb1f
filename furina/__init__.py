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
    from furina.adapters import configure as configure
    from furina.adapters import methods as methods
    from furina.backbones.load import load_backbone as load_backbone
    from furina.backbones.load import load_tokenizer as load_tokenizer
    from furina.data.module import TaskDataModule as TaskDataModule
    from furina.model.accumulation import accumulating as accumulating
    from furina.model.adapter_sets import AdapterSet as AdapterSet
    from furina.model.auxiliary import after_step as after_step
    from furina.model.auxiliary import auxiliary_loss as auxiliary_loss
    from furina.model.auxiliary import auxiliary_tokens as auxiliary_tokens
    from furina.model.checkpoint import load as load
    from furina.model.checkpoint import save as save
    from furina.model.export import export_merged as export_merged
    from furina.model.export import export_peft as export_peft
    from furina.model.inference import evaluation_mode as evaluation_mode
    from furina.model.inject import adapt as adapt
    from furina.model.inject import remove as remove
    from furina.model.merging import is_merged as is_merged
    from furina.model.merging import merge as merge
    from furina.model.merging import unmerge as unmerge
    from furina.model.parameters import adapter_parameters as adapter_parameters
    from furina.model.parameters import adapter_state_dict as adapter_state_dict
    from furina.model.parameters import describe as describe
    from furina.model.parameters import load_adapter_state_dict as load_adapter_state_dict
    from furina.model.parameters import parameter_groups as parameter_groups
    from furina.model.router_removal import without_router as without_router
    from furina.model.selection import record_selection as record_selection
    from furina.model.state import is_adapted as is_adapted
    from furina.training.module import FinetuneModule as FinetuneModule

__version__ = "0.1.0"

_HOME = {
    "adapters": ("configure", "methods"),
    "backbones.load": ("load_backbone", "load_tokenizer"),
    "data.module": ("TaskDataModule",),
    "model.accumulation": ("accumulating",),
    "model.adapter_sets": ("AdapterSet",),
    "model.auxiliary": ("after_step", "auxiliary_loss", "auxiliary_tokens"),
    "model.checkpoint": ("load", "save"),
    "model.export": ("export_merged", "export_peft"),
    "model.inference": ("evaluation_mode",),
    "model.inject": ("adapt", "remove"),
    "model.merging": ("is_merged", "merge", "unmerge"),
    "model.parameters": (
        "adapter_parameters",
        "adapter_state_dict",
        "describe",
        "load_adapter_state_dict",
        "parameter_groups",
    ),
    "model.router_removal": ("without_router",),
    "model.selection": ("record_selection",),
    "model.state": ("is_adapted",),
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
