"""What the adapted layers of a model share: the forward they take part in, and its optimiser step.

In training the model's pre-hook opens a `Forward` and its post-hook closes it. Layers record into
it what their auxiliary loss is made of. Gradient checkpointing runs layers again in the backward
pass, so transformers' checkpoint function is wrapped to reopen the `Forward` it was called in: the
recomputation sees the same mask, however many forwards happened since, and a second record of a
layer is ignored. Under any other checkpoint function layers repeat their operations and record
nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError

Record = tuple[Tensor, ...]
"""What a layer recorded in a forward: sums over real tokens, or what its method makes them of."""


class Operands(NamedTuple):
    """What a layer's forward needs of its parameters alone."""

    a: Tensor
    b: Tensor
    extra: tuple[Tensor, ...] = ()
    """Whatever else the method makes; unlike A and B it is never cast."""

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all of them."""
        return (self.a, self.b, *self.extra)

    def map(self, function: Callable[[Tensor], Tensor]) -> Operands:
        """Return what `function` makes of each."""
        a, b, *extra = map(function, self.tensors())
        return Operands(a, b, tuple(extra))


@dataclass
class Forward:
    """One forward of the wrapped model and the statistics its layers recorded."""

    mask: Tensor | None
    """True where the input's (batch, sequence) positions hold real tokens; None if all do."""
    positions: int
    task_types: Tensor | None = None
    records: dict[str, Record] = field(default_factory=dict)
    """What layers recorded, until the auxiliary loss is made of it."""
    has_loss: bool = False
    """Whether layers recorded for an auxiliary loss."""
    loss: Tensor | None = None
    """The auxiliary loss once somebody has asked for it."""
    was_read: bool = False
    """Whether somebody asked for it."""

    @classmethod
    def of(cls, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Forward:
        """Return the forward of `model` that is called with these arguments."""
        named = inspect.signature(model.forward).bind_partial(*args).arguments | kwargs
        vectors = named.get("inputs_embeds")
        if vectors is None:  # a model of other inputs: the first is its vectors
            vectors = args[0] if args else None
        ids = named.get("input_ids")
        if ids is not None:
            shape = ids.shape
        else:
            shape = torch.Size() if vectors is None else vectors.shape[:-1]
        mask = named.get("attention_mask")
        if mask is None:
            return cls(None, shape.numel() if shape else 0)
        if shape and mask.dim() == 2 and named.get("past_key_values") is not None:
            mask = mask[:, -shape[-1] :]  # it tells of the cached positions, too
        return cls(mask != 0, shape.numel() if shape else 0)

    def real_tokens(self, inputs: Tensor, layer: str) -> Tensor | None:
        """Return the boolean mask of real tokens as (T, 1), or None when none was given.

        Shape: `inputs` is (..., d) with T vectors. Raises ConfigurationError if T is not the
        number of positions in the mask, or in the model's input without one.
        """
        tokens = inputs.shape[:-1].numel()
        if self.mask is not None and self.mask.dim() != 2:
            raise ConfigurationError(
                f"The attention mask has shape {tuple(self.mask.shape)}: pass the (batch, "
                "sequence) padding mask, which says which tokens are real, and no static cache."
            )
        positions = self.positions if self.mask is None else self.mask.numel()
        if tokens != positions:
            of = "model's input" if self.mask is None else "(batch, sequence) attention mask"
            raise ConfigurationError(
                f"{layer} saw {tokens} token vectors but the {of} has {positions} positions, and "
                "what the adapter records needs both alike: leave this linear out of the targets."
            )
        return self.column

    @property
    def column(self) -> Tensor | None:
        """The boolean mask of real tokens as (T, 1), or None when none was given."""
        return None if self.mask is None else self.mask.reshape(-1, 1)

    def tokens(self) -> Tensor:
        """Return the number of real tokens of this forward on this rank, as an integer scalar."""
        if self.mask is not None:
            return self.mask.sum()
        return torch.tensor(self.positions)


UNREAD = 3
"""Warn after so many training forwards in a row whose auxiliary loss nobody asked for."""


class ForwardTracker:
    """Shared by all adapted layers of one model; opened and closed by the model's hooks."""

    def __init__(self) -> None:
        """Start with no forward seen."""
        self.active: Forward | None = None
        self.last: Forward | None = None
        """The last training forward; others leave it."""
        self.shared: dict[str, Operands] | None = None
        """What layers have derived for several training forwards, by their names."""
        self.kept: dict[Hashable, Operands] | None = None
        """What layers have derived, while `keeping`."""
        self.step_sums: dict[str, Tensor | None] = {}
        """Sums of the records by these names since they were last taken; see `sum_over_step`."""
        self._keepers = 0
        self._unread = 0

    def attach(self, model: nn.Module) -> list[Any]:
        """Hook onto `model`'s forward; returns the handles that undo it."""
        return [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, always_call=True),
        ]

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Let layers keep what they derive from their parameters, which must not change inside.

        A change would go unnoticed: autograd does not count writes through `.data` or by fused
        optimisers.
        """
        if self._keepers == 0:
            self.kept = {}
        self._keepers += 1
        try:
            yield
        finally:
            self._keepers -= 1
            if self._keepers == 0:
                self.kept = None

    def forget(self) -> None:
        """Drop what was kept: parameters have changed."""
        if self.kept:
            self.kept.clear()

    def recording(self) -> bool:
        """Return whether layers should compute their statistics now."""
        if self.active is not None and not torch.is_grad_enabled():
            raise ConfigurationError(
                "Reentrant gradient checkpointing cannot carry the auxiliary loss: call "
                "gradient_checkpointing_enable with use_reentrant=False."
            )
        return self.active is not None

    def record(self, layer: str, *statistics: Tensor, for_loss: bool = False) -> None:
        """Keep the first record of `layer`: a recomputation of the same forward counts once."""
        assert self.active is not None
        self.active.has_loss |= for_loss
        if self.active.loss is None and layer not in self.active.records:
            self.active.records[layer] = statistics

    def sum_over_step(self, name: str) -> None:
        """Add up the records by this name from now on, until `take` is called."""
        self.step_sums[name] = None

    def take(self, name: str) -> Tensor | None:
        """Return and forget the sum of the records by this name, None if there were none."""
        total, self.step_sums[name] = self.step_sums[name], None
        return total

    def _open(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        task_types = kwargs.pop("task_types", None)  # the backbone's own forward knows none
        self.active = None
        if model.training and torch.is_grad_enabled():
            self._warn_if_unread()
            self.last = self.active = Forward.of(model, args, kwargs)
            self.active.task_types = task_types
            self._follow_checkpointing(model)
        return args, kwargs

    def _warn_if_unread(self) -> None:
        """Warn once of a training loop that never asks for the auxiliary loss."""
        if self.last is None or not self.last.has_loss:
            return
        self._unread = 0 if self.last.was_read else self._unread + 1
        if self._unread == UNREAD:
            warnings.warn(
                f"Nobody asked for the auxiliary loss of the last {UNREAD} training forwards, so "
                "it takes no part in the training: add furina.auxiliary_loss(model) to the loss "
                "and give the optimiser furina.parameter_groups(model, learning_rate), as "
                "furina.FinetuneModule does, or set the loss's coefficient to 0.",
                stacklevel=2,
            )

    def _close(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        forward, self.active = self.active, None
        if forward is None:
            return
        # Here and not in the layers: a compiled forward may not depend on what came before it.
        for name, total in self.step_sums.items():
            if name in forward.records:
                (sums,) = forward.records[name]
                self.step_sums[name] = sums if total is None else total + sums

    def _follow_checkpointing(self, model: nn.Module) -> None:
        for module in model.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if checkpoint is not None and not isinstance(checkpoint, _ReopeningCheckpoint):
                module._gradient_checkpointing_func = _ReopeningCheckpoint(checkpoint, self)  # type: ignore[assignment]

    def detach(self, model: nn.Module) -> None:
        """Give every module its own checkpoint function back."""
        for module in model.modules():
            checkpoint = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(checkpoint, _ReopeningCheckpoint):
                module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last forward's graph out of copies and pickles."""
        nothing = dict.fromkeys(("active", "last", "shared", "kept"))
        return {**self.__dict__, **nothing, "_keepers": 0}


@dataclass
class _ReopeningCheckpoint:
    """A checkpoint function whose recomputation runs inside the forward that it belongs to."""

    checkpoint: Callable[..., Any]
    tracker: ForwardTracker

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        forward = self.tracker.active

        def run(*inner: Any) -> Any:
            outer, self.tracker.active = self.tracker.active, forward
            try:
                return function(*inner)
            finally:
                self.tracker.active = outer

        return self.checkpoint(run, *args)
