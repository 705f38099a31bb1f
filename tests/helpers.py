"""Tiny random backbones with asymmetric sides, and adapters moved well away from their start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from furina.adapters import AdapterConfig, AdapterLinear, methods
from furina.errors import ConfigurationError, NotMergeableError
from furina.kernels.forward import ForwardTracker
from furina.model.inject import adapt
from furina.model.state import state_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

torch.set_num_threads(1)

VOCABULARY = 48
SIDES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a Llama whose q, k, v, o, gate and down projections have six different shapes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _build(LlamaForCausalLM, LlamaConfig(**SIDES, head_dim=8), dtype, seed)


def tiny_qwen2(dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a Qwen2 with non-zero biases on q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return _build(Qwen2ForCausalLM, Qwen2Config(**SIDES), dtype, seed)


BACKBONES: dict[str, Callable[..., PreTrainedModel]] = {"llama": tiny_llama, "qwen2": tiny_qwen2}


class Chain(nn.Module):
    """Two linears with a tanh between: the smallest model that has more than one linear."""

    def __init__(self, sides: tuple[int, int, int] = (11, 7, 5), bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(sides[0], sides[1], bias=bias)
        self.second = nn.Linear(sides[1], sides[2], bias=bias)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        second: Tensor = self.second(self.first(x).tanh())
        return second


def chain(
    config: AdapterConfig, dtype: torch.dtype = torch.float64, bias: bool = True, seed: int = 0
) -> Chain:
    """Return an adapted `Chain`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Chain(bias=bias).to(dtype)
    return adapt(model, config, targets=["first", "second"], seed=seed)


def _build(kind: Any, config: Any, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = kind._from_config(config, dtype=torch.float64)  # see `_normal`
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.2)
    for parameter in model.parameters():  # as a loader does: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tokens(batch: int = 3, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Return random input ids with right padding, its mask, and labels on real tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 2 * row :] = 0
    ids = ids.masked_fill(mask == 0, 0)
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the model's own next-token loss."""
    loss: Tensor = model(**batch).loss
    return loss


def perturb(model: nn.Module, target: float = 0.2, seed: int = 0) -> dict[str, float]:
    """Move every adapter parameter; return each linear's |ΔW|/|W|, all within 0.1 to 0.3.

    For a method that has no ΔW the parameters are moved and the ratios are missing.
    """
    layers = state_of(model).layers
    return {
        name: ratio
        for index, (name, layer) in enumerate(layers.items())
        if (ratio := perturb_layer(layer, target, seed + index)) is not None
    }


def perturb_layer(layer: AdapterLinear, target: float = 0.2, seed: int = 0) -> float | None:
    """Add noise to every entry and shrink everything but A until |ΔW|/|W| is about `target`.

    Where that does not lead there, as where no parameter is called `lora_A*` and ΔW is a product of
    several, the factor on them is searched for.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [(n, p) for n, p in layer.named_parameters() if not n.startswith("base.")]
    start = {name: parameter.detach().clone() for name, parameter in trained}
    noise = {
        name: _rms(value) * _normal(name, value, generator).to(value)
        for name, value in start.items()
    }

    def move(size: float, scale: float) -> float:
        """Move the parameters and return |ΔW|/|W|."""
        for name, parameter in trained:
            factor = 1.0 if name.startswith("lora_A") else scale
            with torch.no_grad():
                parameter.copy_((start[name] + size * noise[name]) * factor)
        return _ratio(layer)

    try:
        for size in SIZES:
            scale = 1.0
            for _ in range(4):
                ratio = move(size, scale)
                if 0.1 <= ratio <= 0.3:
                    return ratio
                if not ratio:
                    break
                scale *= target / ratio
        for size in SIZES:
            low, high = -20.0, 10.0
            for _ in range(20):
                middle = (low + high) / 2
                ratio = move(size, 2.0**middle)
                if 0.1 <= ratio <= 0.3:
                    return ratio
                low, high = (middle, high) if ratio < target else (low, middle)
    except NotMergeableError:
        return None
    raise AssertionError(
        f"{layer.name}: with noise on {', '.join(start)} and one factor on all that is not called "
        f"lora_A*, |ΔW|/|W| is never near {target}, but {ratio:.2g} in the end: let delta() grow "
        "with its parameters, or teach perturb_layer in tests/helpers.py this method's."
    )


SIZES = (0.5, 0.3, 0.2, 0.1, 0.05)
"""Noise that is added, in units of a parameter's root mean square."""


def _rms(value: Tensor) -> float:
    return value.square().mean().sqrt().item() or 0.5


def _normal(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a tensor, in float64: fp32 normal numbers differ from processor to processor.

    That of B is the same whether B or Bᵀ is stored.
    """
    if name.endswith("Bt"):
        return torch.randn(like.t().shape, generator=generator, dtype=torch.float64).t()
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


def _ratio(layer: AdapterLinear) -> float:
    weight = layer.pristine_weight.to(torch.float64)
    return (layer.delta().norm() / weight.norm()).item()


SMALL = {"dropout": 0.0, "rank": 3, "active_rank": 2, "allocation": (3,), "num_clusters": 3}


def small(method: str, **options: Any) -> AdapterConfig:
    """Return `method` with its defaults, but a small odd rank, few experts and no dropout."""
    known = methods()[method].__dataclass_fields__
    few = {"num_experts": 4} if "router_removed" in known else {}
    own = {name: value for name, value in (SMALL | few).items() if name in known}
    return methods()[method](**(own | options))


MERGEABLE = [name for name in methods() if small(name).mergeability().ok]
ROUTED = [name for name in methods() if not small(name).mergeability().ok]


def variants(method: str, together: int = 2) -> Iterator[AdapterConfig]:
    """Yield `method` with every set of at most `together` switches off their default.

    The switches are the config's booleans and named choices, so that those of a new method are
    covered by themselves; what the config refuses cannot be built and is left out.
    """
    hints = get_type_hints(methods()[method])
    choices = {
        name: get_args(hints[name]) if get_origin(hints[name]) is Literal else (False, True)
        for name in methods()[method].__dataclass_fields__
        if get_origin(hints[name]) is Literal or hints[name] is bool
    }
    default = small(method)
    for values in product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        if sum(getattr(default, name) != value for name, value in options.items()) <= together:
            with suppress(ConfigurationError):
                yield small(method, **options)


def layer_of(
    config: AdapterConfig,
    in_features: int = 11,
    out_features: int = 7,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    seed: int = 0,
) -> AdapterLinear:
    """Return one adapted linear alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
        return config.build(base.requires_grad_(False), "linear", ForwardTracker())


class RowByRow(TorchDispatchMode):
    """Collects the shapes of batched products; an outer product, as of positions, is none."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default and args[0].shape[-1] > 1:
            self.shapes.append((args[0].shape, args[1].shape))
        return func(*args, **(kwargs or {}))


@contextmanager
def contiguity_at_the_head(model: PreTrainedModel) -> Iterator[list[bool]]:
    """Collect whether each input of the output head is contiguous."""
    seen: list[bool] = []
    hook = model.lm_head.register_forward_hook(lambda _, x, y: seen.append(x[0].is_contiguous()))
    yield seen
    hook.remove()


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Return everything that adapting changes: identities, bytes, flags, modes and hooks."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        seen[f"module {name}"] = (id(module), type(module), module.training)
        seen[f"hooks {name}"] = (len(module._forward_pre_hooks), len(module._forward_hooks))
        seen[f"attributes {name}"] = sorted(module.__dict__)
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        seen[name] = (id(tensor), tensor.dtype, tensor.requires_grad, tensor.data_ptr())
        seen[f"bytes {name}"] = raw(tensor)
    return seen


def raw(tensor: Tensor) -> bytes:
    """Return a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def ulp_distance(actual: Tensor, exact: Tensor) -> Tensor:
    """Return |actual − exact| in units in the last place of `actual`'s dtype at `exact`."""
    info = torch.finfo(actual.dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    spacing = info.eps * torch.exp2(exponent.to(torch.float64))
    return (actual.to(torch.float64) - exact).abs() / spacing


def additivity_error(layer: AdapterLinear, seed: int = 0, count: int = 50) -> float:
    """Return max |g(x+y) − g(x) − g(y)| relative to max |g(x+y)|, with g(x) = f(x) − f(0)."""
    generator = torch.Generator().manual_seed(seed)
    width = layer.base.in_features
    x, y = torch.randn(2, count, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        origin = layer(torch.zeros(1, width, dtype=torch.float64))
        together = layer(x + y) - origin
        apart = layer(x) - origin + layer(y) - origin
    return ((together - apart).abs().max() / together.abs().max()).item()
