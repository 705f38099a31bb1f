"""What the analysis computes, as loops over tokens and experts with every product formed.

Nothing here is shared with `furina.analysis`: an expert's (O, I) matrix is made from the stored
parameters by slicing, and experts are picked by sorting.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from furina import reference
from furina.adapters import AdapterLinear
from furina.adapters.flylora import FlyLoRALinear
from furina.adapters.furina import FurinaLinear
from furina.adapters.routing import RoutedLinear
from tests.adapters import loops


def matrices(layer: AdapterLinear) -> list[Tensor]:
    """Return every expert's (O, I) update, up to a scale that all experts have."""
    a = layer.lora_A.detach().double()
    b = layer.lora_B.detach().double()
    if isinstance(layer, FlyLoRALinear):
        return [torch.outer(b[:, i], a[i]) for i in range(len(a))]
    r = layer.config.rank
    if isinstance(layer, FurinaLinear):
        config = layer.config
        routed = range(config.num_shared_experts, config.num_experts)
        return [
            reference.direction(a[e * r : (e + 1) * r], b[:, e * r : (e + 1) * r], config.eps)
            for e in routed
        ]
    assert isinstance(layer, RoutedLinear)
    rows = [a if len(a) == r else a[e * r : (e + 1) * r] for e in range(layer.num_experts)]
    return [b[:, e * r : (e + 1) * r] @ rows[e] for e in range(layer.num_experts)]


def shares(layer: AdapterLinear, x: Tensor) -> list[list[list[float]]]:
    """Return p by token, output unit (one, unless they weigh apart) and expert."""
    found = []
    for token in x.double():
        if isinstance(layer, FurinaLinear):
            found.append(_furina(layer, token))
        elif isinstance(layer, FlyLoRALinear):
            scores = (layer.lora_A.double() @ token + layer.selection_bias.double()).abs()
            found.append([(scores / scores.sum()).tolist()])
        else:
            found.append([loops.softmax(layer.router.detach().double() @ token).tolist()])
    return found


def _furina(layer: FurinaLinear, token: Tensor) -> list[list[float]]:
    outputs = [matrix @ token for matrix in matrices(layer)]
    kind, eps = layer.config.activity, layer.config.eps
    if kind == "l2":
        units = [[math.sqrt(a.square().sum().item() + eps**2) for a in outputs]]
    elif kind == "l1":
        units = [[a.abs().sum().item() + eps for a in outputs]]
    else:
        units = [[a[j].abs().item() + eps for a in outputs] for j in range(len(outputs[0]))]
    return [[value / sum(values) for value in values] for values in units]


def numbers(p: list[list[list[float]]], k: int) -> dict[str, object]:
    """Return top-K share, entropy, F, P and E over tokens and units, each unit weighing alike."""
    rows = [row for token in p for row in token]
    n, count = len(rows[0]), len(rows)
    k = min(k, n)
    best = [sorted(range(n), key=lambda i, row=row: -row[i])[:k] for row in rows]
    return {
        "top_k_share": sum(row[i] for row, top in zip(rows, best, strict=True) for i in top)
        / count,
        "entropy": -sum(v * math.log(v) for row in rows for v in row if v) / math.log(n) / count,
        "frequency": [sum(i in top for top in best) / (k * count) for i in range(n)],
        "share": [sum(row[i] for row in rows) / count for i in range(n)],
        "first": [sum(top[0] == i for top in best) / count for i in range(n)],
    }


def norms(layer: FurinaLinear, x: Tensor) -> tuple[float, float]:
    """Return the mean norms of what FURINA's shared and routed experts add."""
    config = layer.config
    r, s = config.rank, config.num_shared_experts
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    v = layer.magnitude.detach().double().expand(config.num_routed_experts, -1)
    v = v * (config.scale if config.scale_routed else 1.0)
    shared = routed = 0.0
    for token in x.double():
        added = torch.zeros(len(b), dtype=torch.float64)
        for e in range(s):
            rows = slice(e * r, (e + 1) * r)
            added = added + config.scale * b[:, rows] @ (a[rows] @ token)
        shared += added.norm().item()
        self_routed = sum(v[i] * (w @ token) for i, w in enumerate(matrices(layer)))
        routed += torch.as_tensor(self_routed).norm().item()
    return shared / len(x), routed / len(x)


def inputs(model: nn.Module, names: list[str], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the real tokens of a batch bring to each linear. Shape: (T, I)."""
    heard: dict[str, list[Tensor]] = {name: [] for name in names}
    real = batch["attention_mask"] != 0

    def keep(name: str, x: Tensor) -> None:
        heard[name] += [x[row, t] for row in range(len(real)) for t in range(real.shape[1])
                        if real[row, t]]  # fmt: skip

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, x, name=name: keep(name, x[0])
        )
        for name in names
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return {name: torch.stack(rows) for name, rows in heard.items()}
