"""Find the linears that targets name, and refuse each whose weight or forward is not what it seems.

An adapter computes W x + b itself, and merging writes W. Both are right only where a linear is a
plain one: its weight a parameter of its own that is at hand, its forward nn.Linear's, and nobody
reading the weight past the forward.
"""

from __future__ import annotations

import dis
import fnmatch
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a Llama-like block (MixLoRA's and the paper's setting)."""

_WRAPPERS = {
    "OptimizedModule": "torch.compile",
    "DataParallel": "DataParallel",
    "DistributedDataParallel": "DistributedDataParallel",
    "FullyShardedDataParallel": "FullyShardedDataParallel",
    "DeepSpeedEngine": "DeepSpeed",
    "_FabricModule": "Fabric",
    "AveragedModel": "AveragedModel",
    "PeftModel": "peft",
    "CheckpointWrapper": "a checkpoint wrapper",
    "OffloadWrapper": "an offload wrapper",
}
"""Modules that put a name of their own before those of the module inside, and what makes them."""

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wrapper(module: nn.Module) -> str | None:
    """Return what wraps the model inside `module`, such as "torch.compile"; None if nothing."""
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)


def matching_linears(
    model: nn.Module, targets: Sequence[str] | None
) -> tuple[tuple[str, ...], list[str]]:
    """Return the patterns, and the names of the linears that any of them selects.

    Warns of fused experts, which look as if they were selected and are not. Raises
    ConfigurationError for targets that are no list of names, a target that matches nothing, or a
    match that cannot be adapted.
    """
    survey = _Survey(model)
    maker = wrapper(model)
    if maker is not None:
        raise ConfigurationError(_wrapped("", maker))
    patterns = survey.patterns(targets)
    absent = [t for t in patterns if not any(_matches(name, t) for name in survey.modules)]
    if absent and targets is None:
        advice = ": name targets" if survey.adaptable() else ""
        raise ConfigurationError(
            f"{type(model).__name__} has no {', '.join(absent)}, which are adapted by default"
            f"{advice}; {survey.offer()}."
        )
    if absent:
        raise ConfigurationError(f"Target {absent[0]!r} matches no module; {survey.offer()}.")
    matched = [name for name in survey.modules if any(_matches(name, t) for t in patterns)]
    for name in matched:
        why = survey.refusal(name)
        if why is not None:
            raise ConfigurationError(why)
    survey.warn_of_fused_experts(patterns, matched)
    return patterns, matched


class _Survey:
    """The modules of a model by all their names, and how often each one and each weight is used."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._module_uses = Counter(map(id, self.modules.values()))
        parameters = model.named_parameters(remove_duplicate=False)
        self._weight_uses = Counter(_memory(parameter) for _, parameter in parameters)
        # A cache of its own: a class may be patched between two calls of `adapt`.
        self._reads: Callable[[Any], frozenset[str]] = cache(_read_past_the_forward)
        self._is_dispatched = any(hasattr(module, "_hf_hook") for module in self.modules.values())

    def patterns(self, targets: Sequence[str] | None) -> tuple[str, ...]:
        """Return checked targets, the default ones for None."""
        if targets is None:
            return DEFAULT_TARGETS
        named = not isinstance(targets, str) and all(isinstance(name, str) for name in targets)
        if not targets or not named:
            meant = f": {self.offer()}" if targets == "all-linear" else ""
            raise ConfigurationError(
                'targets must be a list of module names such as ["q_proj", "v_proj"], not '
                f"{targets!r}{meant}."
            )
        return tuple(targets)

    def adaptable(self) -> list[str]:
        """Return the last parts of the names of all linears that can be adapted."""
        linears = [name for name, module in self.modules.items() if type(module) is nn.Linear]
        return sorted({_leaf(name) for name in linears if self.refusal(name) is None})

    def offer(self) -> str:
        """Return which linears could be targets, and which look as if they could and cannot."""
        others: dict[str, set[str]] = {}
        for name, module in self.modules.items():
            kind = type(module)
            if kind.__name__ == "Conv1D" or (isinstance(module, nn.Linear) and kind != nn.Linear):
                others.setdefault(kind.__name__, set()).add(_leaf(name))
        said = [
            f"its {', '.join(sorted(names))} are {kind}, which furina does not adapt"
            for kind, names in others.items()
        ]
        fused = self._fused_experts()
        if fused:
            said.append(f"its experts are fused tensors ({fused[0]}), which are no nn.Linear")
        found = ", ".join(self.adaptable())
        nothing = "none of its linears can be adapted (no plain nn.Linear of its own)"
        return "; ".join([*said, f"linears that could match end in: {found}" if found else nothing])

    def refusal(self, name: str) -> str | None:
        """Return why the module of that name cannot be adapted; None if it can."""
        module = self.modules[name]
        for outer in _outer(name):
            maker = wrapper(self.modules[outer])
            if maker is not None:
                return _wrapped(outer, maker)
        kind = type(module)
        if kind is not nn.Linear:
            own = getattr(nn, kind.__name__, kind) is kind  # no other class of torch's name
            is_a = kind.__name__ if own else f"{kind.__module__}.{kind.__name__}"
            return (
                f"{name or 'The model itself'} is a {is_a}, not a plain nn.Linear, so it cannot be "
                f"adapted; {self.offer()}."
            )
        if self._module_uses[id(module)] > 1:
            return (
                f"{name} is used in more than one place of the model, so an update would act "
                "twice: leave it out of the targets."
            )
        return self._weight_refusal(name, module) or self._forward_refusal(name, module)

    def warn_of_fused_experts(self, patterns: Sequence[str], matched: Sequence[str]) -> None:
        """Warn if targets name an expert's tensor, or linears beside it: it is not adapted."""
        fused = self._fused_experts()
        blocks = tuple(f"{tensor.rpartition('.experts.')[0] or tensor}." for tensor in fused)
        named = any(_matches(tensor, target) for tensor in fused for target in patterns)
        if named or any(name.startswith(blocks) for name in matched):
            warnings.warn(
                f"The routed experts of this model ({len(fused)} tensors such as {fused[0]}) are "
                "fused tensors, not nn.Linear: they stay as they are, and only the linears beside "
                "them are adapted.",
                stacklevel=4,
            )

    def _weight_refusal(self, name: str, linear: nn.Linear) -> str | None:
        own = linear._parameters
        if own.get("weight") is None or "bias" not in own:
            return (
                f"The weight of {name} is computed anew in each forward (weight_norm, "
                "spectral_norm or pruning), so merging would not last: make it permanent first, "
                "for example with torch.nn.utils.prune.remove or remove_weight_norm."
            )
        weight = linear.weight
        if weight.is_meta and self._is_dispatched:
            return (
                f"The weight of {name} is offloaded to the disk or the CPU and not at hand: load "
                "the backbone without offloading (a device_map that leaves nothing on the disk or "
                "the CPU, no cpu_offload)."
            )
        if type(weight) is not nn.Parameter:
            return (
                f"The weight of {name} is a {type(weight).__name__}, not a plain parameter: adapt "
                "the model before it is quantised or sharded."
            )
        if weight.shape != (linear.out_features, linear.in_features):
            return (
                f"The weight of {name} has shape {tuple(weight.shape)}, and its linear takes "
                f"{linear.in_features} features to {linear.out_features}: adapt the model before "
                "it is sharded, or correct the linear."
            )
        if weight.dtype not in _DTYPES:
            return (
                f"The weight of {name} is {weight.dtype}, in which no update can be added: load "
                "the backbone in bfloat16 or float32."
            )
        if self._weight_uses[_memory(weight)] > 1:
            return (
                f"The weight of {name} is tied to another module's, which merging would change "
                "too: leave it out of the targets."
            )
        return None

    def _forward_refusal(self, name: str, linear: nn.Linear) -> str | None:
        if _has_own_forward(linear):
            return (
                f"The forward of {name} was replaced by another function, which the adapter would "
                "bypass: adapt the model before its linears are patched."
            )
        for outer in _outer(name):
            holder = self.modules[outer]
            kind = type(holder)
            reads = getattr(holder, "slow_but_exact", True)  # BLOOM's do so with this option alone
            if reads and _leaf(name) in self._reads(kind):
                return (
                    f"{kind.__name__} reads the weight of {name} itself, past any adapter: leave "
                    "it out of the targets."
                )
        return None

    def _fused_experts(self) -> list[str]:
        """Return the names of matrices that belong to experts directly, not to their linears."""
        return [
            f"{name}.{key}"
            for name, module in self.modules.items()
            if "experts" in f"{name} {type(module).__name__}".lower()
            and not isinstance(module, nn.Linear)
            for key, tensor in module.named_parameters(recurse=False)
            if tensor.dim() > 1
        ]


def _wrapped(name: str, kind: str) -> str:
    return (
        f"{name or 'The model'} is wrapped by {kind}, so the adapter's names would not be the "
        "backbone's: adapt the model first, then wrap it."
    )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target) or fnmatch.fnmatchcase(name, target)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _outer(name: str) -> Iterator[str]:
    """Yield the names of the modules that hold the one of that name, the model's "" last."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _memory(parameter: Tensor) -> object:
    """Return what two parameters share that lie in the same place."""
    if type(parameter) is not nn.Parameter or parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.device, parameter.data_ptr()


def _has_own_forward(linear: nn.Linear) -> bool:
    """Tell whether a linear's forward is not its class's; accelerate's may move its input only."""
    own = vars(linear)
    forward = own.get("forward")
    hook = own.get("_hf_hook")
    hooks: Sequence[Any] = getattr(hook, "hooks", (hook,))
    if all(type(each).__name__ == "AlignDevicesHook" and not each.offload for each in hooks):
        forward = own.get("_old_forward")
    return forward is not None and getattr(forward, "__func__", None) is not nn.Linear.forward


def _read_past_the_forward(kind: Any) -> frozenset[str]:
    """Return the names under which a module's forward reads what a layer around a linear hides.

    The code says it: `self.dt_proj.weight`, as in Mamba, in the forward or in what it calls.
    """
    found: set[str] = set()
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        method: Any = getattr(kind, name, None)
        function = inspect.unwrap(method)
        if name in seen or not hasattr(function, "__code__"):
            continue
        seen.add(name)
        for code in _code(function.__code__):
            found |= _holders_of_hidden(code)
            waiting += code.co_names
    return frozenset(found)


@cache
def _holders_of_hidden(code: CodeType) -> frozenset[str]:
    hidden = {"weight", "bias", "in_features", "out_features"}
    steps = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    return frozenset(
        one.argval
        for one, two in pairwise(steps)
        if one.opname == two.opname == "LOAD_ATTR" and two.argval in hidden
    )


def _code(code: CodeType) -> Iterator[CodeType]:
    """Yield a function's code and that of the functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
