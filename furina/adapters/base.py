"""The contract of a fine-tuning method: a frozen config that builds one layer per linear.

A method is one file with a config dataclass, decorated by `register`, and a layer. Everything else
(injection, training, merging, files, exports, the command line, the contract tests) goes through
what is defined here and knows no method by name.

Shape legend: T tokens, I = d in_features, O = k out_features, N experts, r rank of one expert.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from types import NoneType
from typing import (
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor, nn

from furina.adapters.sharding import is_sharded
from furina.context import ForwardTracker, Operands, Record
from furina.errors import ConfigurationError, nearest

_REGISTRY: dict[str, type[AdapterConfig]] = {}


class Mergeability(NamedTuple):
    """Whether one fixed weight update reproduces the method exactly, and why (not)."""

    ok: bool
    reason: str


class ParameterCount(NamedTuple):
    """Trainable parameters of one adapted linear.

    `router` of them belong to a router; `active` of them, the router included, act on one token.
    """

    trainable: int
    router: int
    active: int


@dataclass(frozen=True)
class AdapterConfig(ABC):
    """Options of a method; one field per option, validated when the config is made."""

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    parameter_formula: ClassVar[str]
    """Of one (d, k) linear in r, N, d and k; words may follow a semicolon."""
    scope: ClassVar[Literal["linear", "block"]] = "linear"
    """Whether one linear's update can be seen alone, or only that of the block it is part of."""
    deviations: ClassVar[str] = ""
    """How this implementation differs from released code, and what of it was not verified."""

    dropout: float = 0.05
    """Probability of dropping an element of the adapter's input; off in eval mode."""

    def __post_init__(self) -> None:
        """Check the options; raises ConfigurationError naming the field."""
        for option, choices in _choices(type(self)).items():
            self.require(getattr(self, option) in choices, option, f"one of {choices}")
        for option, value in self.to_dict().items():
            self.require(not isinstance(value, float) or math.isfinite(value), option, "finite")
        self.require(0 <= self.dropout < 1, "dropout", "a probability in [0, 1)")

    @abstractmethod
    def build(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> AdapterLinear:
        """Wrap `base`, the linear called `name` in the model."""

    @abstractmethod
    def mergeability(self) -> Mergeability:
        """Say whether this configuration merges, with the reason."""

    @abstractmethod
    def count(self, in_features: int, out_features: int, name: str = "") -> ParameterCount:
        """Return the parameters of one (in, out) linear, called `name`, in closed form."""

    def resolve(self, names: Sequence[str]) -> Self:
        """Return this config made definite for a model whose linears `names` are adapted."""
        return self

    def link(self, layers: Mapping[str, AdapterLinear]) -> None:  # noqa: B027
        """Connect the built layers of a model with one another, if the method does so."""

    @property
    def exact_start(self) -> bool:
        """Whether the adapted linear starts as the base to the bit, not just to rounding."""
        return True

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training adds a loss of the method's own."""
        return False

    @property
    def records_selection(self) -> bool:
        """Whether its layers can tell which experts are active, for `furina.record_selection`."""
        return False

    def peft_options(self) -> dict[str, object]:
        """Return the options of peft's LoraConfig that its exported adapter needs."""
        return {}

    def statistics(
        self, records: Mapping[str, Record], mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Reduce what the linears recorded to sums over real tokens; by default it is these sums.

        Shape: `mask` (T, 1) is true for real tokens, None if all are.
        """
        return {name: sums for name, (sums,) in records.items()}

    def auxiliary_loss(self, statistics: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
        """Reduce the linears' sums over `tokens` real tokens to the weighted auxiliary loss."""
        raise AssertionError(f"{self.name} has no auxiliary loss")

    def learning_rate_multipliers(self) -> dict[str, float]:
        """Return {parameter name within a layer: factor on the learning rate}, if not 1."""
        return {}

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raise ConfigurationError unless `condition` holds for `field`."""
        if not condition:
            value = getattr(self, field)
            raise ConfigurationError(f"{self.name}: {field}={value!r} must be {allowed}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


C = TypeVar("C", bound=AdapterConfig)


@cache
def _choices(config: type[AdapterConfig]) -> dict[str, tuple[Any, ...]]:
    """Return {option: allowed values} of the options that are a Literal."""
    hints = get_type_hints(config).items()
    return {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}


class AdapterLinear(nn.Module, ABC):
    """A frozen linear with a method's update beside it: y = W x + b + update(x)."""

    dropout: float = 0.0
    """Probability of dropping an element of the update's input in training."""

    def __init__(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> None:
        """Keep `base` as it is; the method's parameters are at least fp32."""
        super().__init__()
        self.base = base
        self.name = name
        self.tracker = tracker
        self._pristine: Tensor | None = None
        self._merged = False
        self._kept: dict[torch.dtype, tuple[list[object], Operands]] = {}

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Float64 beside a float64 weight, else fp32: small updates must not round away."""
        wide = self.base.weight.dtype == torch.float64
        return torch.float64 if wide else torch.float32

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Apply the adapted linear. Shape: (..., I) → (..., O)."""

    @property
    def drop_rate(self) -> float:
        """Return `dropout` in training mode, else 0."""
        return self.dropout if self.training else 0.0

    def derive(self) -> Operands | None:
        """Return what the forward needs of the parameters; None if it uses them as they are."""
        return None

    def operands(self, x: Tensor, dtype: torch.dtype | None = None) -> Operands:
        """Return `derive()`, which must not be None, made once where possible.

        Inside `furina.accumulating` it is made once for all forwards. Without gradients A and B
        are in `dtype`, or else x's, and kept until a parameter changes. Autograd does not count
        writes through `.data`: call `model.eval()` after such a write. With a `dtype`, which is for
        `low_rank_product`, B is stored by columns on a CPU: a single token reads it faster so.
        """
        if torch.is_grad_enabled():
            self._kept.clear()  # a step may come, and fused optimisers leave no trace in `_version`
            shared = self.tracker.shared
            return self._derived() if shared is None else shared.leaves[self.name]
        compiling = torch.compiler.is_compiling()
        state = None if compiling else self._state()
        chosen = dtype or x.dtype
        kept = self._kept.get(chosen)
        if kept is not None and kept[0] == state:
            return kept[1]
        a, b, extra = self._derived()
        a, b = a.to(chosen), b.to(chosen)
        if dtype is not None and x.device.type == "cpu" and not compiling:
            b = b.t().contiguous().t()
        made = Operands(a, b, extra)
        if state is not None:
            self._kept[chosen] = state, made
        return made

    def _state(self) -> list[object] | None:
        """Return what differs once a tensor has changed, None if one may change unseen.

        The tensors are what `adapter_tensors` names, and any other buffer. Every token waits for
        this, 210 times in a small model: hence one plain loop.
        """
        tensors = [*self._parameters.values(), *self._buffers.values()]
        if len(self._modules) > 1:
            for name, module in self._modules.items():
                if module is not None and name != "base":
                    tensors += [*module.parameters(), *module.buffers()]
        state: list[object] = [self.training]
        for tensor in tensors:
            if tensor is not None:
                if tensor.grad is not None or tensor.is_inference():
                    return None
                state += (tensor.data_ptr(), tensor._version)
        return state

    def _derived(self) -> Operands:
        made = self.derive()
        assert made is not None, f"{type(self).__name__} asks for operands and derives none"
        return made

    def train(self, mode: bool = True) -> AdapterLinear:
        """Switch the mode and forget what was kept."""
        self._kept.clear()
        super().train(mode)
        return self

    @abstractmethod
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Return float64 (B, A) with ΔW = B A, (O, R) and (R, I); None if ΔW is not low-rank.

        Raises NotMergeableError where no fixed update exists.
        """

    def peft_state(self) -> dict[str, Tensor] | None:
        """Return what peft's LoRA layer of scale 1 holds for this update; None if none equals it.

        Raises NotMergeableError where no fixed update exists.
        """
        factors = self.factors()
        if factors is None:
            return None
        b, a = factors
        return {"lora_A.weight": a, "lora_B.weight": b}

    def delta(self) -> Tensor:
        """Return ΔW in float64. Shape: (O, I). Raises NotMergeableError where there is none."""
        factors = self.factors()
        assert factors is not None, f"{type(self).__name__} must override delta"
        b, a = factors
        return b @ a

    @property
    def records_statistics(self) -> bool:
        """Whether a forward records sums over real tokens for the auxiliary loss or an observer."""
        return False

    def must_record(self, has_auxiliary_loss: bool) -> bool:
        """Return whether the forward that runs now must record them."""
        wanted = self.tracker.observer is not None or has_auxiliary_loss
        return wanted and self.records_statistics and self.tracker.recording()

    def step_statistics(self) -> Tensor | None:
        """Return and forget the sums since the last optimiser step, if the method keeps any."""
        return None

    def after_step(self, statistics: Tensor) -> None:
        """Update what is not trained by gradient, from the sums of all ranks."""

    def after_load(self) -> None:
        """Follow the adapter's tensors, which were just loaded."""

    def restore_base(self) -> None:
        """Undo what building did to the base; it is not merged now."""

    def change_base(self) -> None:
        """Do to the base again what building did and `restore_base` undid."""

    def auxiliary_slices(self) -> list[tuple[nn.Parameter, tuple[slice, ...]]]:
        """Return the parts of parameters that the auxiliary loss is meant to shape."""
        return []

    def adapter_tensors(self) -> dict[str, Tensor]:
        """Return the method's parameters and persistent buffers by name, without the base's."""
        state = self.state_dict(keep_vars=True)
        return {name: value for name, value in state.items() if not name.startswith("base.")}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLinear:
        """Follow the model to a device or dtype, but keep the parameters at least fp32."""
        before = {name: tensor.detach() for name, tensor in self.adapter_tensors().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.adapter_tensors().items():
            if tensor.dtype != self.parameter_dtype:
                tensor.data = before[name].to(tensor.device, self.parameter_dtype)
        return self

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the update now."""
        return self._merged

    @property
    def has_pristine_weight(self) -> bool:
        """Whether the backbone's own W is at hand: not after a merge that kept no copy."""
        return not self._merged or self._pristine is not None

    @property
    def pristine_weight(self) -> Tensor:
        """The backbone's own W, whether merged or not. Shape: (O, I)."""
        if not self.has_pristine_weight:
            raise ConfigurationError(
                f"{self.name} was merged with keep_base=False, so W is gone: reload the backbone."
            )
        if is_sharded(self.base.weight):
            raise ConfigurationError(
                f"{self.name} is sharded over several devices: gather the adapter on all of them "
                "with furina.adapter_state_dict, and load it into a model on one."
            )
        return self.base.weight.detach() if self._pristine is None else self._pristine

    @torch.no_grad()
    def merged_weight(self, delta: Tensor | None = None) -> Tensor:
        """Return W + ΔW, summed in float64 and rounded once to the base's dtype. Shape: (O, I).

        `delta` is `delta()`, where it is at hand: it is what costs.
        """
        weight = self.pristine_weight.to(self.base.weight.device)
        delta = self.delta() if delta is None else delta
        return (weight.to(torch.float64) + delta).to(self.base.weight.dtype)

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Write the merged weight into the base; a copy of W on the CPU makes it undoable."""
        if self._merged:
            raise ConfigurationError(f"{self.name} is merged already.")
        merged = self.merged_weight()
        if keep_base:
            self._pristine = self.base.weight.detach().to("cpu", copy=True)
        self.base.weight.copy_(merged)
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore W bit for bit; raises ConfigurationError if no copy was kept.

        The layer then follows the base; see `follow_base`.
        """
        if not self._merged:
            raise ConfigurationError(f"{self.name} is not merged.")
        self.base.weight.copy_(self.pristine_weight)
        self._pristine = None
        self._merged = False
        self.follow_base()

    def follow_base(self) -> None:
        """Take over the mode, device and dtype that the model gave the base in the meantime."""
        self.train(self.base.training).to(self.base.weight.device)  # `_apply` sees to the dtype


def kaiming_uniform(rows: int, columns: int, fan_in: int, like: AdapterLinear) -> nn.Parameter:
    """Return a parameter drawn from U(−1/√fan_in, 1/√fan_in), nn.Linear's default (a = √5)."""
    base, bound = like.base.weight, 1 / math.sqrt(fan_in)
    weight = torch.empty(rows, columns, dtype=like.parameter_dtype, device=drawn_on(base))
    return nn.Parameter(weight.uniform_(-bound, bound).to(base.device))


def drawn_on(weight: Tensor) -> str:
    """Return where random numbers beside `weight` are drawn: a seed is the same on all devices."""
    return "meta" if weight.is_meta else "cpu"


def zeros(*shape: int, like: AdapterLinear) -> nn.Parameter:
    """Return a parameter of zeros beside `like`'s weight."""
    base = like.base.weight
    return nn.Parameter(torch.zeros(*shape, dtype=like.parameter_dtype, device=base.device))


def register(name: str) -> Callable[[type[C]], type[C]]:
    """Register a config class as method `name`; a second one of that name is an error."""

    def add(config: type[C]) -> type[C]:
        if name in _REGISTRY:
            raise ConfigurationError(f"Method {name!r} is registered twice.")
        config.name = name
        _REGISTRY[name] = config
        return config

    return add


def methods() -> dict[str, type[AdapterConfig]]:
    """Return every registered method, by name."""
    return dict(sorted(_REGISTRY.items()))


def configure(method: str, options: Mapping[str, Any]) -> AdapterConfig:
    """Make `method`'s config from plain options, checking names, types and values.

    Raises ConfigurationError for an unknown method or option (with the nearest right one) and for
    a value of the wrong type.
    """
    if method not in _REGISTRY:
        raise ConfigurationError(f"Unknown method {method!r}.{nearest(method, _REGISTRY)}")
    config = _REGISTRY[method]
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            raise ConfigurationError(
                f"Method {method} has no option {option!r}.{nearest(option, known)}"
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
        raise ConfigurationError(f"Method {config.name}: {reason}") from error
    return config(**parsed.options.as_dict())
