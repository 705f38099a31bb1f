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
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any, ClassVar, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from furina.adapters.mergeable import MergeableLinear
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker, Operands, Record
from furina.options.hints import choices, is_of, scalars

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
    listed: ClassVar[bool] = True
    """Whether `furina methods` and the tests of all methods include it."""
    scope: ClassVar[Literal["linear", "block"]] = "linear"
    """Whether one linear's update can be seen alone, or only that of the block it is part of."""
    deviations: ClassVar[str] = ""
    """How this implementation differs from released code, and what of it was not verified."""

    dropout: float = 0.05
    """Probability of dropping an element of the adapter's input; off in eval mode."""

    def __post_init__(self) -> None:
        """Check the options; raises ConfigurationError naming the field."""
        for option, kinds in scalars(type(self)).items():
            names = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
            self.require(is_of(getattr(self, option), kinds), option, f"a plain {names}")
        for option, values in choices(type(self)).items():
            self.require(getattr(self, option) in values, option, f"one of {values}")
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
        """Return this config with what it leaves open decided by the adapted linears' `names`."""
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
        """Whether a token selects some of the experts, for `furina.record_selection`."""
        return False

    def peft_options(self) -> dict[str, object]:
        """Return the options of peft's LoraConfig that its exported adapter needs."""
        return {}

    def statistics(
        self, records: Mapping[str, Record], mask: Tensor | None
    ) -> Mapping[str, Tensor]:
        """Reduce what the linears recorded to sums over real tokens; by default it is one already.

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


class AdapterLinear(MergeableLinear):
    """A frozen linear with a method's update beside it: y = W x + b + update(x)."""

    dropout: float = 0.0
    """Probability of dropping an element of the update's input in training."""

    def __init__(self, base: nn.Linear, name: str, tracker: ForwardTracker) -> None:
        """Keep `base` as it is; the method's parameters are at least fp32."""
        super().__init__(base, name)
        self.tracker = tracker

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
        """Return `derive()`, which must not be None, from a cache where parameters stay the same.

        Inside `furina.accumulating` all forwards with gradients share it, inside
        `furina.evaluation_mode` all forwards without. Without gradients A and B are in `dtype`, by
        default x's. With a `dtype`, which is for `low_rank_product`, B is stored by columns on a
        CPU, where a single token reads it faster.
        """
        if torch.is_grad_enabled():
            self.tracker.forget()  # a step may come
            shared = self.tracker.shared
            return self._derived() if shared is None else shared[self.name]
        compiling = torch.compiler.is_compiling()
        kept = None if compiling else self.tracker.kept
        chosen = dtype or x.dtype
        key = self.name, chosen, self.training
        if kept is not None and key in kept:
            return kept[key]
        a, b, extra = self._derived()
        a, b = a.to(chosen), b.to(chosen)
        if dtype is not None and x.device.type == "cpu" and not compiling:
            b = b.t().contiguous().t()
        made = Operands(a, b, extra)
        if kept is not None:
            kept[key] = made
        return made

    def _derived(self) -> Operands:
        made = self.derive()
        assert made is not None, f"{type(self).__name__} asks for operands and derives none"
        return made

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
        """Whether a training forward records what the auxiliary loss is made of."""
        return False

    def record(self, x: Tensor, statistics: Callable[[], Record]) -> None:
        """Record what `statistics` returns if this forward of x trains on the auxiliary loss.

        A checkpoint function that reruns the layer in a backward pass needs the same operations
        again, and nothing is recorded then. Raises ConfigurationError as `real_tokens`.
        """
        if not self.records_statistics:
            return
        tracker = self.tracker
        self.real_tokens(x)
        if tracker.recording():
            tracker.record(self.name, *statistics(), for_loss=True)
        elif self.training and torch.is_grad_enabled():
            if torch._C._current_graph_task_id() == -1:  # no backward pass: a forward of a part
                tracker.last = None
            else:
                statistics()

    def real_tokens(self, x: Tensor) -> Tensor | None:
        """Return the mask of real tokens (T, 1) of the forward that runs now, None without one.

        Raises ConfigurationError if x (..., I) does not hold the tokens of the model's input.
        """
        forward = self.tracker.active
        return None if forward is None else forward.real_tokens(x, self.name)

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
    """Register a config class as method `name`; another class of that name is an error.

    The same class defined again, as by a notebook's cell that runs twice, replaces the old one.
    """

    def add(config: type[C]) -> type[C]:
        old = _REGISTRY.get(name, config)
        if (old.__module__, old.__qualname__) != (config.__module__, config.__qualname__):
            raise ConfigurationError(
                f"Method {name!r} is registered twice, by {old.__qualname__} and "
                f"{config.__qualname__}: give one of them another name."
            )
        config.name = name
        _REGISTRY[name] = config
        return config

    return add
