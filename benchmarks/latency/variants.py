"""The variants that decoding.py times: ours, peft's, and models loaded from a folder."""

from __future__ import annotations

import copy
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import furina
from benchmarks.common.models import adapt, method_options, noises, peft_model, twin
from benchmarks.common.moe_peft import PEERS, Peer
from furina.evaluation.latency import Timer, Timing, generate
from furina.model.state import state_of

LITERAL = ("lora_literal", "furina_literal")
"""The method written out: each expert by itself."""
PEFT = (
    *("peft_lora_unmerged", "peft_lora_bf16_unmerged", "peft_lora_merged"),
    *("peft_dora_unmerged", "peft_dora_merged"),
)
MOE_PEFT = PEERS[:3]
DISK = ("disk_base", "disk_merged")
"""The backbone's folder and the one that FURINA is merged into, loaded alike."""
COMPILED = (
    *("compiled_base", "compiled_lora_unmerged"),
    *("compiled_furina_unmerged", "compiled_furina_merged"),
)
NOISE = 0.04
"""Of the noise that every parameter is moved by: a start has many zeros."""


def variant_names() -> list[str]:
    """Return every variant: the base, each method unmerged and, if it merges, merged, and peers."""
    names = ["base"]
    for method, config in furina.methods().items():
        names.append(f"{method}_unmerged")
        if config().mergeability().ok:
            names.append(f"{method}_merged")
    return [*names, *LITERAL, *PEFT, *MOE_PEFT, *DISK, *COMPILED]


def build(name: str, backbone: Any, options: Namespace) -> Timer:
    """Return the timer of the variant `name`; raises FurinaError where it cannot be built."""
    if name in MOE_PEFT:
        row = torch.zeros(1, 8, dtype=torch.long)
        return Peer(f"kept/{name}", {"input_ids": row, "attention_mask": row + 1}, options)
    compiled = name.startswith("compiled_")
    model = variant_model(name.removeprefix("compiled_"), backbone, options)
    if compiled:
        if name.endswith("_unmerged"):
            as_pair(model)
        model.forward = torch.compile(model.forward, dynamic=False)
    return partial(timed, model.eval(), compiled)


@torch.inference_mode()
def timed(model: Any, static_cache: bool, prompt: Tensor, new_tokens: int) -> Timing:
    """Generate and return how long it took."""
    prompt = prompt.to(model.device)
    return generate(model, prompt, new_tokens, static_cache=static_cache)[1]


def variant_model(name: str, backbone: Any, options: Namespace) -> Any:
    """Return a model on the backbone's parameters, or on a copy where weights change."""
    if name == "base":
        return twin(backbone)
    if name in DISK:
        return from_disk(name == "disk_merged", backbone, options)
    if name in PEFT:
        return peer_model(name, backbone, options)
    method, _, way = name.rpartition("_")
    model = adapted(method, backbone, options, own_weights=way == "merged")
    if way == "merged":
        furina.merge(model, keep_base=False)
    if way == "literal":
        write_out(model)
    return model


def adapted(method: str, backbone: Any, options: Namespace, own_weights: bool = False) -> Any:
    """Return the backbone with a method whose every parameter has been moved."""
    changes_base = not furina.configure(method, method_options(method, options)).exact_start
    model = copy.deepcopy(backbone) if own_weights or changes_base else twin(backbone)
    adapt(model, method, options)
    move(furina.adapter_parameters(model).values(), options.seed)
    return model


@torch.no_grad()
def move(parameters: Iterable[Tensor], seed: int) -> None:
    """Move every parameter a little."""
    moved = [*parameters]
    for parameter, noise in zip(moved, noises(moved, seed), strict=True):
        parameter.add_(NOISE * noise)


def peer_model(name: str, backbone: Any, options: Namespace) -> Any:
    """Return peft's model with every adapter parameter moved, merged if the name says so."""
    peer, _, way = name.rpartition("_")
    merged = way == "merged"
    model = peft_model(peer, copy.deepcopy(backbone) if merged else twin(backbone), options)
    move((p for p in model.parameters() if p.requires_grad), options.seed)
    return model.merge_and_unload() if merged else model


def from_disk(merged: bool, backbone: Any, options: Namespace) -> Any:
    """Save the backbone, or FURINA merged into it, and load that folder."""
    with tempfile.TemporaryDirectory(prefix="latency-") as folder:
        path = Path(folder) / "model"
        if merged:
            furina.export_merged(adapted("furina", backbone, options), path)
        else:
            backbone.save_pretrained(path)
        return furina.load_backbone(str(path), options.dtype, options.device, options.attention)


class WrittenOut(nn.Module):
    """y = W x + b + Σ_i m_i ⊙ B_i A_i x, expert by expert. Shape: (..., I) → (..., O)."""

    def __init__(self, base: nn.Linear, experts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Keep (A_i (r, I), B_i (O, r), m_i (O,)) of each expert in the base's dtype."""
        super().__init__()
        self.base = base
        self.experts = [tuple(each.to(base.weight) for each in expert) for expert in experts]

    def forward(self, x: Tensor) -> Tensor:
        """Add one expert after the other."""
        y: Tensor = self.base(x)
        for a, b, m in self.experts:
            y = y + m * nn.functional.linear(nn.functional.linear(x, a), b)
        return y


def as_pair(model: Any) -> None:
    """Put the update's factors in the adapter's place: a graph would make B̃ for each token."""
    adapters = furina.AdapterSet(model, "trained")
    adapters.combine("pair", {"trained": 1.0})
    adapters.use("pair")


@torch.no_grad()
def write_out(model: nn.Module) -> None:
    """Put the literal form in the place of every adapted linear."""
    for name, layer in state_of(model).layers.items():
        model.set_submodule(name, WrittenOut(layer.base, list(experts_of(layer))))


def experts_of(layer: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (A_i, B_i, m_i): m is s for LoRA and a shared expert, v/d̃_i for a routed one."""
    config = layer.config if hasattr(layer, "config") else None
    a, b = layer.lora_A, layer.lora_B
    if config is None:
        yield a, b, torch.full((len(b),), layer.scale)
        return
    (norm, _) = layer.derive().extra
    for i in range(config.num_experts):
        rows = slice(i * config.rank, (i + 1) * config.rank)
        shared = i < config.num_shared_experts
        m = torch.full((len(b),), config.scale) if shared else layer.magnitude / norm[i]
        yield a[rows], b[:, rows], m
