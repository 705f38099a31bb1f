"""Several adapters on one backbone: one is in use at a time, the others wait beside the model.

    adapters = furina.AdapterSet(model)
    adapters.load("maths", folder)
    adapters.use("maths")                  # no file is read and no weight copied
    furina.merge(model)                    # acts on the adapter in use, as everything else does
    adapters.use("science")                # unmerges bit for bit first

Each adapter wraps the same linears of the backbone, whatever its method, options and targets; to
switch is to put other layers around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from furina.adapters import AdapterConfig
from furina.errors import ConfigurationError, nearest
from furina.model.also_trained import also_trained
from furina.model.checkpoint import load
from furina.model.combination import Combination, combined_factors, lora_of
from furina.model.config_file import read_adapter_config
from furina.model.inject import adapt, detach, reattach
from furina.model.merging import is_merged, merge
from furina.model.parameters import load_adapter_state_dict
from furina.model.state import AdaptedState, is_adapted, state_of


class AdapterSet:
    """Named adapters of one backbone.

    Only `use` decides which one the model has: adding and combining leave the model as it is,
    merged or not. An adapter that waits is no part of the model, so that neither `parameters()` nor
    `state_dict()` shows it, and it follows the model's mode, device and dtype when it comes back.
    Whatever is in use, `use(None)` gives the backbone back bit for bit.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        """Start with the adapter that `model` has, called `name` or after its method; or with none.

        Raises ConfigurationError if a name is given and there is no adapter.
        """
        self.model = model
        self._states: dict[str, AdaptedState] = {}
        if name is not None or is_adapted(model):
            state = state_of(model)
            self._states[state.config.name if name is None else name] = state

    def __repr__(self) -> str:
        return f"AdapterSet({', '.join(self.names)}; in use: {self.active})"

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters, in the order in which they came."""
        return tuple(self._states)

    @property
    def active(self) -> str | None:
        """The adapter in use; None for the bare backbone, after `furina.remove` too.

        Raises ConfigurationError if the model has an adapter that is not of this set.
        """
        if not is_adapted(self.model):
            return None
        current = state_of(self.model)
        for name, state in self._states.items():
            if state is current:
                return name
        raise ConfigurationError(
            f"The model has a {current.config.name} adapter that is not of this set: call "
            "furina.remove first."
        )

    def load(self, name: str, folder: str | Path, check_backbone: bool = True) -> None:
        """Add the adapter that `furina.save` wrote to `folder`.

        Raises ConfigurationError if the name is taken or other weights were trained beside the
        adapter, AdapterFileError as `furina.load` does; the set is then unchanged.
        """
        if others := read_adapter_config(folder)["also_trained"]:
            raise ConfigurationError(
                f"The adapter in {folder} was trained together with {others[0]}, which the others "
                "of a set would share: load it alone with furina.load."
            )
        self._add(name, lambda: load(folder, self.model, check_backbone))

    def add(
        self,
        name: str,
        method: str | AdapterConfig = "furina",
        *,
        targets: Sequence[str] | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        """Add a new adapter, to be trained once it is in use; the arguments are `furina.adapt`'s.

        Raises ConfigurationError if the name is taken, or as `furina.adapt` does.
        """
        self._add(name, lambda: adapt(self.model, method, targets=targets, seed=seed, **options))

    def combine(
        self,
        name: str,
        weights: Mapping[str, float],
        method: Combination = "linear",
        power: float = 2.0,
    ) -> None:
        """Add Σ_i λ_i ΔW_i of the adapters named by `weights` as one LoRA of scale 1.

        "linear": λ_i is the weight. "from": the weight times a share that grows with ‖ΔW_i‖_F to
        the `power`, linear by linear; see `furina.model.combination`. The rank is the sum of the
        ranks.

        Raises ConfigurationError for an unknown adapter or method, and for a weight that cannot be;
        NotMergeableError if an update is not fixed or not low-rank (a router, DoRA).
        """
        states = {part: self._state(part) for part in weights}

        def build() -> None:
            config, tensors = lora_of(combined_factors(states, weights, method, power))
            patterns = [pattern for state in states.values() for pattern in state.targets]
            adapt(self.model, config, targets=tuple(dict.fromkeys(patterns)), seed=0)
            load_adapter_state_dict(self.model, tensors)

        self._add(name, build)

    def use(self, name: str | None) -> None:
        """Put the adapter called `name` into the model, unmerged, or none for the bare backbone.

        The one in use before is unmerged first, bit for bit; if it is the same, nothing happens.
        Raises ConfigurationError, and changes nothing, if there is no such adapter, or if the model
        was merged with keep_base=False. If a linear was replaced in the model, it is bare then.
        """
        state = None if name is None else self._state(name)
        current = self.active
        if name is not None and name == current:
            return
        if current is not None:
            self._refuse_others()
            tracker = detach(self.model).tracker
            tracker.active = tracker.last = None  # the last forward's graph would be kept alive
        if state is not None:
            reattach(self.model, state)

    def drop(self, name: str) -> None:
        """Forget an adapter; if it is in use, the model is the bare backbone then.

        Raises ConfigurationError if there is no such adapter.
        """
        state = self._state(name)
        if is_adapted(self.model) and state_of(self.model) is state:
            self.use(None)
        del self._states[name]

    def _state(self, name: str) -> AdaptedState:
        if name not in self._states:
            raise ConfigurationError(f"There is no adapter {name!r}.{nearest(name, self._states)}")
        return self._states[name]

    def _add(self, name: str, build: Callable[[], object]) -> None:
        """Let `build` adapt the bare backbone, and keep what it made."""
        if name in self._states:
            raise ConfigurationError(
                f"There is an adapter {name!r} already: choose another name, or drop it first."
            )
        with self._bare():
            build()
            self._states[name] = detach(self.model)

    def _refuse_others(self) -> None:
        """Refuse to take out an adapter that other weights belong to: those would stay."""
        if others := also_trained(self.model):
            raise ConfigurationError(
                f"{next(iter(others))} is trained beside the adapter in use, and the others of the "
                "set would share it: freeze it, or keep to this adapter without a set."
            )

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Take the adapter in use out for a while; merged weights come back bit for bit."""
        current = self.active
        merged = current is not None and is_merged(self.model)
        if current is not None:
            self._refuse_others()
            detach(self.model)
        try:
            yield
        finally:
            if is_adapted(self.model):  # what an interrupted build left
                detach(self.model)
            if current is not None:
                reattach(self.model, self._states[current])
            if merged:
                merge(self.model)
