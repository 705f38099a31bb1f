"""Plain formats out of an adapted model: a merged Hugging Face folder, and one PEFT LoRA."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from furina.errors import ConfigurationError, NotMergeableError
from furina.model.also_trained import also_trained
from furina.model.fingerprint import published_name
from furina.model.merging import is_merged, merge, require_unchanged, unmerge
from furina.model.state import state_of
from furina.model.targets import wrapper
from furina.storage import atomic_directory, write_json


class Saveable(Protocol):
    """A tokenizer, as far as exporting needs it."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write the files to a folder."""


def export_merged(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: Saveable | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the merged model as a plain folder that `from_pretrained` loads without furina.

    Weights are written in `dtype`; by default in what the checkpoint was stored in if the model
    was loaded with dtype "auto", else in the model's own. W + ΔW is rounded to it once. The model
    is left as it was, merged or not.

    Raises NotMergeableError, ConfigurationError if `path` is the folder the backbone came from, a
    weight overflows `dtype`, transformers refuses the model's generation config, a part of the
    model is wrapped or a merged one was changed since, or FurinaError if other files would be lost.
    """
    source = Path(str(model.config._name_or_path))
    if source.is_dir() and source.resolve() == Path(path).resolve():
        raise ConfigurationError(f"{path} holds the backbone itself: name a new folder.")
    _require_own_names(model)
    require_unchanged(model)
    _require_valid_generation_config(model)
    was_merged = is_merged(model)
    written = dtype or getattr(model, "checkpoint_dtype", None) or model.dtype
    if not was_merged:
        merge(model)
    try:
        with atomic_directory(Path(path)) as folder:
            if written == model.dtype:
                model.save_pretrained(str(folder))
            else:
                model.save_pretrained(str(folder), state_dict=_rounded(model, written))
                _say_dtype(folder / "config.json", written)
            if tokenizer is not None:
                tokenizer.save_pretrained(str(folder))
    finally:
        if not was_merged:
            unmerge(model)


def _require_own_names(model: nn.Module) -> None:
    """Refuse a model of which a part was wrapped after `adapt`: its file's names would be wrong."""
    state_of(model)
    for name, module in model.named_modules():
        kind = wrapper(module)
        if kind is not None:
            raise ConfigurationError(
                f"{name} is wrapped by {kind}, so the file would have names that no backbone has: "
                "put the module inside back in its place first."
            )


def _require_valid_generation_config(model: PreTrainedModel) -> None:
    """Ask transformers now what it asks when all weights are written."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
    except ValueError as error:
        said = " ".join(str(error).split()).partition(" Fix these issues")[0]
        raise ConfigurationError(
            f"transformers would not write the model's generation_config ({said}): set its fields "
            "right, or model.generation_config = GenerationConfig(), before exporting."
        ) from error


@torch.no_grad()
def _rounded(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the merged model's tensors in `dtype`; those that shared memory still do."""
    rounded: dict[int, Tensor] = {}
    tensors = {}
    wide = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not any(part in name for part in wide):
            tensor = rounded.setdefault(tensor.data_ptr(), tensor.to(dtype))
        tensors[name] = tensor
    for name, layer in state_of(model).layers.items():
        if layer.has_pristine_weight:  # else the sum is there in the model's dtype only
            delta = layer.delta()
            total = layer.pristine_weight.to(delta.device, torch.float64) + delta
            tensors[f"{name}.weight"] = total.to(dtype)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ConfigurationError(
                f"{name} has entries that overflow {dtype}: nothing was written; name another "
                "dtype."
            )
    return tensors


def _say_dtype(file: Path, dtype: torch.dtype) -> None:
    """Make a config.json name `dtype` in place of the live model's."""
    config = json.loads(file.read_text(encoding="utf-8"))
    write_json(file, {**config, "dtype": str(dtype).removeprefix("torch.")})


@torch.no_grad()
def export_peft(model: nn.Module, path: str | Path) -> int:
    """Write the adapter as one PEFT LoRA for `PeftModel.from_pretrained`; returns its rank.

    The factors are in fp32 with scale 1: B̃ (k, R) and A (R, d), R = N·r for FURINA, and DoRA's
    magnitude beside them. Where linears have several ranks all are padded with zeros to the
    largest, which is returned. Weights that were trained beside the adapter are peft's
    `modules_to_save`. The base model is named as on the hub where it came from there, else by its
    folder on this machine: so is an asset's, since no published model has its weights.

    Raises NotMergeableError if the method has no fixed update, or one that peft cannot hold, and
    ConfigurationError if peft cannot hold what else was trained.
    """
    state = state_of(model)
    require_unchanged(model)
    mergeable = state.config.mergeability()
    if not mergeable.ok:
        raise NotMergeableError(f"Method {state.config.name} is no LoRA: {mergeable.reason}.")
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name, layer in state.layers.items():
        parts = layer.peft_state()
        if parts is None:
            raise NotMergeableError(
                f"The update of {state.config.name} is not low-rank, so no LoRA equals it: "
                "export the merged model."
            )
        for part, tensor in parts.items():
            if not tensor.isfinite().all():
                raise ConfigurationError(
                    f"{name} has NaN or infinite entries: it was not exported."
                )
            tensors[f"base_model.model.{name}.{part}"] = tensor.to("cpu", torch.float32)
        ranks[name] = parts["lora_A.weight"].shape[0]
    rank = max(ranks.values())
    for name, own in ranks.items():  # llama.cpp and vLLM know one rank and one alpha for all
        a, b = (f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB")
        tensors[a] = functional.pad(tensors[a], (0, 0, 0, rank - own))
        tensors[b] = functional.pad(tensors[b], (0, rank - own))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    modules = _modules_to_save(model)
    for name in modules:
        for part, tensor in model.get_submodule(name).state_dict().items():
            tensors[f"base_model.model.{name}.{part}"] = tensor.to("cpu", copy=True).contiguous()
    config = _peft_config(model, rank) | ({"modules_to_save": modules} if modules else {})
    with atomic_directory(Path(path), last="adapter_config.json") as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)
    return rank


def _modules_to_save(model: nn.Module) -> list[str]:
    """Return the modules, of tied ones each, whose own weights were trained beside the adapter."""
    trained = {id(weight): name for name, weight in also_trained(model).items()}
    layers = state_of(model).layers
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = [trained[id(p)] for p in module.parameters(recurse=False) if id(p) in trained]
        linear = name.removesuffix(".base")
        if own and (linear in layers or not name or [*module.children()]):
            raise ConfigurationError(
                f"{own[0]} was trained beside the adapter, and peft saves whole modules without "
                "adapters only: export the merged model."
            )
        if own:
            found.append(name)
    return found


def _peft_config(model: nn.Module, rank: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": published_name(model),
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": _peft_targets(model),
        **state_of(model).config.peft_options(),
    }


def _peft_targets(model: nn.Module) -> list[str]:
    """Return last name parts where they select just the adapted linears, else full names."""
    adapted = set(state_of(model).layers)
    suffixes = {name.rpartition(".")[2] for name in adapted}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return sorted(suffixes if selected == adapted else adapted)
