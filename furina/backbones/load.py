"""Pretrained models and tokenizers by name, and tiny random ones for trying things out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from furina.assets import intact, is_offline
from furina.assets.convert import quiet_transformers
from furina.assets.hub import cached_file, cached_model, reason, refusal
from furina.backbones.architectures import ARCHITECTURES
from furina.backbones.names import is_local, local_folder, meant, models, refuse_adapters
from furina.backbones.tiny import TINY, tiny_config, tiny_model, tiny_tokenizer
from furina.errors import ConfigurationError, nearest
from furina.kernels.processor import AUTO, resolve_dtype
from furina.model.fingerprint import published_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
CHECKPOINT = "checkpoint"
"""Stands for the dtype that the weights are stored in."""


def load_backbone(
    name: str, dtype: str = AUTO, device: str | None = None, attention: str | None = None
) -> PreTrainedModel:
    """Load a causal language model in eval mode.

    It remembers as `model.backbone_name` what loads it again, from whatever folder that is said,
    which `furina.save` notes. Loaded with "auto" it remembers as `model.checkpoint_dtype` what its
    weights were stored in, which `furina.export_merged` writes.

    Args:
        name: an asset of `furina assets`, "tiny-llama" or "tiny-qwen2" (random weights), a local
            model folder, or a name on the Hugging Face hub.
        dtype: "bfloat16", "float16", "float32" or "float64"; "auto" for bfloat16 where the device
            multiplies it natively, else float32; "checkpoint" for that of the stored weights.
        device: where to put it; None leaves it on the CPU for a trainer to move to the accelerator,
            which "auto" then asks.
        attention: transformers' `attn_implementation`; None for its default.

    Raises:
        ConfigurationError: the name leads to no model or to an adapter, its weights are not those
            of its architecture, or the dtype is unknown.
        AssetError: the asset is not cached.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    number_format = _dtype(resolve_dtype(dtype, device).dtype)
    model: PreTrainedModel
    if name in TINY:
        with _failures(name):
            model = tiny_model(name, number_format or torch.float32, attention)
    else:
        source = _source(name, weights=True)
        # transformers prints a table of odd weights, which are an error here.
        with _failures(name), quiet_transformers(errors_only=True):
            stored = AutoConfig.from_pretrained(source).dtype
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=number_format or "auto",
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            model, weights = loaded
            if stored is None:  # older files do not say it, and the weights are asked
                stored = AutoModelForCausalLM.from_pretrained(source, dtype="auto").dtype
        if dtype == AUTO:
            model.checkpoint_dtype = stored
        _require_whole(name, model, weights)
    again: Any = name if name in (*models(), *TINY) else published_name(model)
    model.backbone_name = again
    torch.nn.Module.to(model, device or "cpu")
    torch.nn.Module.eval(model)
    return model


def meta_backbone(name: str, dtype: str = "bfloat16") -> PreTrainedModel:
    """Build a backbone without its weights, on the meta device; nothing is fetched.

    Args:
        name: one of `furina.backbones.architectures`, "tiny-llama" or "tiny-qwen2", a local model
            folder, or a name on the hub whose config.json is in the hub's cache.
        dtype: as in `load_backbone`; "auto" and "checkpoint" are what config.json says.

    Raises:
        ConfigurationError: no config.json of it is at hand, or the dtype is unknown.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    number_format, file = _dtype(dtype), None if name in TINY else _shape(name)
    with _failures(name, _shaped()), torch.device("meta"):
        config = AutoConfig.from_pretrained(str(file)) if file else tiny_config(name)
        chosen = number_format or config.dtype
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=chosen)  # type: ignore[no-untyped-call]
    torch.nn.Module.eval(model)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `load_backbone(name)`.

    One without a pad token gets its end-of-text token for it; padding is always masked.

    Raises:
        ConfigurationError: the name leads to no tokenizer.
        AssetError: the asset is not cached.
    """
    from transformers import AutoTokenizer

    if name in TINY:
        return tiny_tokenizer(has_bos=name == "tiny-llama")
    source = _source(name)
    with _failures(name, kind="the tokenizer of"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def backbone_hash(model: PreTrainedModel) -> str:
    """Return the sha256 over name, dtype, shape and bytes of every weight, in order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _source(name: str, weights: bool = False) -> str:
    """Return the folder or hub name to load; a path that holds no model is refused here.

    So is an asset whose files, with `weights` the weights too, are not as they were made.
    """
    if name in models():
        return str(intact(name, weights))
    folder = local_folder(name)
    if folder is not None:
        return str(folder)
    why = refusal(name, "model")
    if why is None:
        return name
    # Loading by hub name asks the hub a few things even with local_files_only; a folder does not.
    snapshot = cached_model(name)
    if snapshot is None:
        raise ConfigurationError(f"{why} There is no folder {name} either.{meant(name)}")
    if not is_offline():
        warnings.warn(f"{why} Its copy in the hub's cache is used.", stacklevel=3)
    return str(snapshot)


def _require_whole(name: str, model: PreTrainedModel, weights: dict[str, Any]) -> None:
    """Raise ConfigurationError unless a checkpoint held the model's weights and no others.

    transformers would draw what is missing at random; it has left out by now what a model ties,
    makes itself or declares to be of no use.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigurationError(f"{name} holds a PEFT adapter: name the model it was trained on.")
    made = dict(model.named_buffers())  # what older versions stored and the model makes now
    held = sorted(weights["unexpected_keys"])
    excess = [key for key in held if key not in made and not key.endswith(".masked_bias")]
    wrong = [
        text.format(f"{keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}")
        for text, keys in (
            ("lacks {}", sorted(weights["missing_keys"])),
            ("holds {} in another shape", sorted(key for key, *_ in weights["mismatched_keys"])),
            ("holds {}, which such a model has not", excess),
        )
        if keys
    ]
    if wrong:
        advice = "check its config.json, or get its weights again"
        if any(".base." in key for key in excess):
            advice = "an adapted model was saved there, which furina.export_merged does rightly"
        raise ConfigurationError(
            f"{name} is no whole {type(model).__name__}: it {'; it '.join(wrong)}; {advice}."
        )


def _dtype(name: str) -> torch.dtype | None:
    """Return the dtype of that name, None for the checkpoint's own."""
    known = [*DTYPES, AUTO, CHECKPOINT]
    if name not in known:
        raise ConfigurationError(f"There is no dtype {name!r}.{nearest(name, known)}")
    return DTYPES.get(name)


def _shape(name: str) -> Path:
    """Return the config.json that says a backbone's shape; the hub is not asked."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    folder = Path(_source(name)) if is_local(name) else Path(name).expanduser()
    refuse_adapters(name, folder)
    if (folder / "config.json").is_file():
        return folder / "config.json"
    cached = cached_file(name, "config.json")
    if cached is None:
        absent = FileNotFoundError(
            "there is no such folder; its config.json is not at hand, and the hub is not asked; "
            f"`hf download {name} config.json` fetches it"
        )
        raise ConfigurationError(_no_such(name, absent, _shaped()))
    return cached


def _shaped() -> list[str]:
    return [*ARCHITECTURES, *TINY]


@contextmanager
def _failures(name: str, known: list[str] | None = None, kind: str = "backbone") -> Iterator[None]:
    """Say in one sentence why transformers cannot load what a name leads to."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigurationError(_no_such(name, error, known, kind)) from error


def _no_such(
    name: str, error: Exception, known: list[str] | None = None, kind: str = "backbone"
) -> str:
    why = reason(error, name, "model")
    if why is None:
        first = str(error).strip().partition("\n")[0].rstrip(".: ").removesuffix(" from one of")
        if is_offline() and cached_model(name):
            first += "; offline only its copy in the hub's cache is read, which may lack files"
        why = f"Cannot load {kind} {name!r} ({first})."
    return f"{why}{nearest(name, known) if known else meant(name)}"
