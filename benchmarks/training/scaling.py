"""Measure how an adapted linear's training cost grows; the last line printed is JSON.

    python -m benchmarks.training.scaling --results results/training
    python -m benchmarks.training.scaling --sweeps shapes --rounds 20

One linear runs forward and backward in training mode four ways: frozen (with a gradient to its
input only), LoRA of total rank N·r, FURINA of N experts of rank r without and with its selection
loss. FURINA has one shared expert and top_k = 2 as by default; a single expert is not shared, and
below four experts there are too few routed ones for a selection loss.

Seconds are medians over rounds that run all four in a new order; ratios to LoRA are of the times of
one round. `saved_bytes` is what autograd keeps for the backward beyond the parameters, the same in
every run; on a CUDA device `peak_bytes` is the most that a step allocates.

FLOPs are those of matrix products, counted as a plan counts them (`furina.plan.counting`).
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import furina
from benchmarks.common.command import Parser, Report, described, run
from benchmarks.common.memory import rise
from benchmarks.common.rounds import interleaved, quotients, timed
from benchmarks.training import scaling_page, scaling_points
from benchmarks.training.scaling_points import Point
from furina.adapters import AdapterConfig, methods
from furina.model.state import is_adapted, state_of
from furina.plan.counting import Count

TOP_K = 2


class Single(nn.Module):
    """The smallest model with a linear to adapt."""

    def __init__(self, linear: nn.Linear) -> None:
        """Hold the linear."""
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        """Apply it; the mask is for the hooks of the adapter."""
        y: Tensor = self.linear(x)
        return y


@dataclass
class Variant:
    """A model with its input (1, T, d) and the gradient of its output (1, T, k)."""

    model: Single
    x: Tensor
    gradient: Tensor
    mask: Tensor
    with_loss: bool

    def clear(self) -> None:
        """Free what the last step left."""
        self.model.zero_grad()
        self.x.grad = None
        if is_adapted(self.model):
            state_of(self.model).tracker.last = None

    def forward(self) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return what to go back from and its gradients."""
        y = self.model(self.x, attention_mask=self.mask)
        if self.with_loss:
            return [y, furina.auxiliary_loss(self.model)], [self.gradient, None]
        return [y], [self.gradient]

    def step(self) -> None:
        """Run forward and backward."""
        torch.autograd.backward(*self.forward())

    def seconds(self) -> float:
        """Return what one step takes."""
        self.clear()
        return timed(self.step)[0]

    def flops(self) -> int:
        """Return what one step multiplies and adds."""
        with Count(self.model) as counted:
            self.step()
        flops: int = counted.flops
        return flops

    def saved_bytes(self) -> int:
        """Return the size of all storages kept for the backward, but those of parameters."""
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self.forward()
        owned = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        return sum(storage.nbytes() for address, storage in kept.items() if address not in owned)

    def peak_bytes(self) -> int | None:
        """Return the most that a step allocates on a CUDA device."""
        if not self.x.is_cuda:
            return None
        self.clear()
        return rise(self.step, [self.x])


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "device rounds threads seed results", rounds=10)
    sweeps = scaling_points.SWEEPS
    made.add_argument("--sweeps", nargs="+", choices=sweeps, default=list(sweeps))
    dtypes = ("bfloat16", "float16", "float32")
    made.add_argument("--dtype", choices=dtypes, default="bfloat16", help="of weight and input")
    made.add_argument("--quick", action="store_true", help="tiny layers, to try the script")
    return made.checked(arguments, "rounds threads")


def adapters_of(point: Point) -> dict[str, AdapterConfig]:
    """Return each variant's adapter."""
    n, shared = point.num_experts, point.num_shared
    experts = {"num_experts": n, "num_shared_experts": shared, "rank": point.rank, "top_k": TOP_K}
    options: dict[str, dict[str, Any]] = {
        "lora": {"rank": n * point.rank},
        "furina_no_loss": {**experts, "selection_coefficient": 0.0},
    }
    if n - shared > TOP_K:
        options["furina"] = experts
    return {name: methods()[name.partition("_")[0]](**own) for name, own in options.items()}


def models_of(point: Point, base: nn.Linear, seed: int) -> dict[str, Single]:
    """Return the variants' models, which share the frozen linear."""
    models = {"frozen": Single(base).requires_grad_(False)}
    for name, config in adapters_of(point).items():
        model = furina.adapt(Single(base), config, targets=["linear"], seed=seed)
        with torch.no_grad():  # the selection loss has a gradient once v is not 0
            for tensor in state_of(model).layers["linear"].adapter_tensors().values():
                tensor.normal_(std=0.02)
        models[name] = model
    return {name: model.train() for name, model in models.items()}


def variants_of(point: Point, options: Namespace) -> dict[str, Variant]:
    """Return the variants, which share input and output's gradient too."""
    kind: dict[str, Any] = {"dtype": getattr(torch, options.dtype), "device": options.device}
    base = nn.Linear(point.in_features, point.out_features, bias=False, **kind)
    x = torch.randn(1, point.tokens, point.in_features, **kind).requires_grad_()
    gradient = torch.randn(1, point.tokens, point.out_features, **kind)
    mask = torch.ones(1, point.tokens, dtype=torch.long, device=options.device)
    return {
        name: Variant(model, x, gradient, mask, with_loss=name == "furina")
        for name, model in models_of(point, base, options.seed).items()
    }


def measure_point(point: Point, options: Namespace, order: random.Random) -> Report:
    """Count and time all variants of one linear."""
    torch.manual_seed(options.seed)  # how much dropout drops is part of what is kept
    variants = variants_of(point, options)
    found = {name: counts(variant) for name, variant in variants.items()}
    runs = {name: lambda _, each=each: each.seconds() for name, each in variants.items()}
    seconds = {n: s[1:] for n, s in interleaved(runs, options.rounds + 1, order).items()}
    for name, own in seconds.items():
        found[name] |= {
            "seconds": median(own),
            "seconds_by_round": own,
            "ratio_to_lora": median(quotients(own, seconds["lora"])),
        }
    return {**asdict(point), "variants": found}


def counts(variant: Variant) -> Report:
    """Return what does not depend on the machine's load."""
    return {
        "flops": variant.flops(),
        "peak_bytes": variant.peak_bytes(),
        "saved_bytes": variant.saved_bytes(),
    }


def measure(options: Namespace, command: str) -> Report:
    """Measure every point of the sweeps; return the report."""
    torch.set_num_threads(options.threads)
    order = random.Random(options.seed)
    sizes = scaling_points.QUICK if options.quick else scaling_points.Sizes()
    points = []
    for sweep in options.sweeps:
        for point in scaling_points.points_of(sweep, sizes):
            print(f"{point.series} = {point.value}", flush=True)
            points.append(measure_point(point, options, order))
    costs = scaling_points.backbone_costs(points)
    return {**described(options, command), "points": points, "backbones": costs}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script."""
    run("training.scaling", parse, measure, "scaling", scaling_page.page, arguments)


if __name__ == "__main__":
    main()
