"""What a run will do, need and take, told without its weights, its hub or its device.

A plan counts parameters, FLOPs and memory on the meta device, tokens by a sample of the data where
these are at hand, and hours by a device's speed. It says what is a bound. Not part of a plan are
loading, merging, checkpoints, latency rounds and activity.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from furina.backbones.load import DTYPES
from furina.evaluation.engine import budget_of
from furina.experiment.config import RunConfig
from furina.experiment.measures import RATIO_WINDOWS
from furina.plan import counting
from furina.plan.counting import EAGER, FULL, FUSED, Adapted, Method, Shape
from furina.plan.devices import CPU, Device, device
from furina.plan.lengths import Lengths, steps_of, training_lengths
from furina.plan.questions import asked, number_asked
from furina.progress import advance
from furina.training.attention import EAGER_UP_TO

DEVICE = "h100-80gb"
TRAINED = 4 * FULL
"""Bytes of a trained parameter: itself, its gradient and AdamW's two moments."""
CACHE_PASSES = 3
"""How often a written token goes through the keys and values kept: to append to them transformers
reads and writes them all, and attention reads them again."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, or of scoring where nothing is trained.

    Not counted is what an allocator leaves unused (often some percent) and what the driver itself
    takes (some hundred MB).

    Attributes:
        weights: the frozen backbone.
        adapter: its parameters, their gradients and moments, and what it holds beside them.
        working: what operations make: activations, logits, keys and values.
    """

    weights: int
    adapter: int
    working: int

    @property
    def total(self) -> int:
        """Everything together."""
        return self.weights + self.adapter + self.working


@dataclass(frozen=True)
class Plan:
    """What one run comes to.

    Attributes:
        config: the run.
        device: what it is planned for.
        parameters: of the backbone.
        adapted: what its method adapts; None for the untouched backbone.
        steps: optimiser steps; 0 where nothing is trained.
        lengths: tokens of its training rows; None where nothing is trained.
        training_flops: of all steps, and of the held-out rows' losses.
        scoring_flops: of all items, as often as they are scored.
        training_hours: on one device.
        scoring_hours: on one device.
        memory: of one device at the peak.
        counted_by: whose tokenizer counted the tokens; "" where some are bounds.
        measured: whether it was to count them at all.
        notes: what to know of these numbers, a sentence each without its full stop.
    """

    config: RunConfig
    device: Device
    parameters: int
    adapted: Adapted | None
    steps: int
    lengths: Lengths | None
    training_flops: int
    scoring_flops: int
    training_hours: float
    scoring_hours: float
    memory: Memory
    counted_by: str
    measured: bool
    notes: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the adapted linears."""
        return self.adapted.linears if self.adapted else ()

    @property
    def trainable(self) -> int:
        """Trained parameters."""
        return self.adapted.trainable if self.adapted else 0

    @property
    def tokens(self) -> int:
        """Tokens that are trained on, padding not counted; at most, where they are bounds."""
        mean = self.lengths.mean if self.lengths else 0.0
        return round(self.steps * self.config.batch_size * mean)

    @property
    def hours(self) -> float:
        """Device hours altogether."""
        return self.training_hours + self.scoring_hours

    @property
    def excess(self) -> int:
        """Bytes that the device is short of; 0 where the run fits."""
        return max(0, self.memory.total - self.device.memory)


def plan(config: RunConfig, on: str | Device = DEVICE, measure: bool = True) -> Plan:
    """Plan a run for a device of `furina.plan.devices`.

    Without `measure` no text is tokenised, and every row taken to be as long as it can be.
    Raises ConfigurationError for what could not run: an unknown backbone, method, option, target,
    task, protocol or device.
    """
    if config.is_base:
        config.check_tasks()
    else:
        config.check_training()
    if config.score_without_router:
        config.adapter_config()  # which looks whether there is one
    target = device(on) if isinstance(on, str) else on
    config = target.resolved(config)
    method = method_of(config)
    found = counting.adapted_of(config.backbone, method) if method else None
    lengths = training_lengths(config, measure) if found else None
    training, training_hours, steps = 0, 0.0, 0
    if found and lengths:
        steps = steps_of(config)
        training = _training_flops(config, target, found, lengths, steps)
        reached = target.speed(config, micro_rows(config) * lengths.padded)
        training_hours = training / reached.training / 3600
    scoring, scoring_hours, counted = _scoring(config, target, found, measure)
    by = {*counted, lengths.tokenizer} if lengths else counted
    return Plan(
        config=config,
        device=target,
        parameters=counting.parameters_of(config.backbone),
        adapted=found,
        steps=steps,
        lengths=lengths,
        training_flops=training,
        scoring_flops=scoring,
        training_hours=training_hours,
        scoring_hours=scoring_hours,
        memory=_memory(config, target, found, lengths, measure),
        counted_by="" if None in by else ", ".join(sorted(str(name) for name in by)),
        measured=measure,
        notes=_notes(config, target, by),
    )


def plan_all(
    configs: Sequence[RunConfig], on: str | Device = DEVICE, measure: bool = True
) -> list[Plan]:
    """Plan each run."""
    target = device(on) if isinstance(on, str) else on
    plans: list[Plan] = []
    for number, config in enumerate(configs):
        advance(number, len(configs), "runs")
        plans.append(plan(config, target, measure))
    return plans


def micro_rows(config: RunConfig) -> int:
    """Return the rows of a micro-batch on one device."""
    own = -(-config.batch_size // config.world_size)
    return min(own, config.micro_batch_size or own)


def method_of(config: RunConfig) -> Method | None:
    """Return what a run adapts its backbone with, None for the untouched backbone."""
    if config.is_base:
        return None
    return Method(config.method, json.dumps(config.adapter, sort_keys=True), config.targets)


def _step(config: RunConfig, target: Device, lengths: Lengths) -> counting.Training:
    method = method_of(config)
    assert method is not None
    eager = config.attention == EAGER or (
        config.attention is None and target.name == CPU and lengths.mean <= EAGER_UP_TO
    )
    return counting.training(
        config.backbone,
        method,
        config.dtype,
        EAGER if eager else FUSED,
        config.gradient_checkpointing,
        accumulates=micro_rows(config) * config.world_size < config.batch_size,
    )


def _reading(config: RunConfig, method: Method | None) -> counting.Reading:
    return counting.reading(config.backbone, method, config.dtype)


def _training_flops(
    config: RunConfig, target: Device, found: Adapted, lengths: Lengths, steps: int
) -> int:
    rows, cost = micro_rows(config), _step(config, target, lengths)
    micro = Shape(rows, lengths.padded, lengths.answer)
    one = cost.step.of(micro) * config.batch_size / rows
    times = -(-steps // config.validation_interval) if config.validation_interval else 1
    looks = cost.forward.of(micro) * config.validation_size / rows * times
    if found.config.records_selection:  # the last look again, with each linear's own sums
        looks += 2 * looks / times
    if found.config.has_auxiliary_loss:  # a forward and two backward passes each
        looks += RATIO_WINDOWS * 1.5 * one
    return round(steps * one + looks)


def _scoring(
    config: RunConfig, target: Device, found: Adapted | None, measure: bool
) -> tuple[int, float, set[str | None]]:
    """Return FLOPs, hours, which the writing of answers may bound, and whose tokenizers counted."""
    reached, size = target.speed(config), _item_size(config)
    plain = _reading(config, None).forward, reached.plain
    passes = [plain]
    if found:
        own = _reading(config, method_of(config)).forward, reached.adapted
        passes = [own, *[plain] * found.config.mergeability().ok]
        passes += [own] * config.score_without_router
    parameters = counting.parameters_of(config.backbone)
    cached = counting.cached_numbers(config.backbone)
    flops, reading, writing, by = 0, 0.0, 0.0, set[str | None]()
    for task, protocol in config.scored:
        items, how = number_asked(config, task), asked(config, task, protocol, measure)
        tokens = items * (how.read(config.engine) + how.written * how.beams)
        answers = items * (how.continued + how.written * how.beams)
        rows = max(1, round(tokens / how.row))
        for cost, rate in passes:
            taken = cost.of(Shape(rows, how.row, answers / rows))
            flops, reading = flops + taken, reading + taken / rate
        kept = items * how.beams * (how.context + how.written / 2) * cached
        weights = -(-items // config.eval_batch_size) * parameters
        moved = how.written * (weights + CACHE_PASSES * kept) * size
        if moved:
            writing += len(passes) * moved / target.reading(config)
        by.add(how.tokenizer)
    return flops, max(reading, writing) / 3600, by


def _memory(
    config: RunConfig,
    target: Device,
    found: Adapted | None,
    lengths: Lengths | None,
    measure: bool,
) -> Memory:
    weights = counting.parameters_of(config.backbone) * _item_size(config)
    scoring = Memory(
        weights=weights,
        adapter=FULL * (found.trainable + found.kept) if found else 0,
        working=_scoring_bytes(config, target, measure),
    )
    if found is None or lengths is None:
        return scoring
    shards = config.world_size if config.strategy == "fsdp" else 1
    micro = Shape(micro_rows(config), lengths.longest, lengths.answer)
    training = Memory(
        weights=weights // shards,
        adapter=(TRAINED * found.trainable + FULL * found.kept) // shards,
        working=_step(config, target, lengths).peak.of(micro),
    )
    return max(training, scoring, key=lambda memory: memory.total)


def _scoring_bytes(config: RunConfig, target: Device, measure: bool) -> int:
    """Return what scoring holds: a batch as full as the engine packs it, and what is written."""
    budget = budget_of(torch.device(CPU if target.name == CPU else "cuda"))
    peak, size = _reading(config, method_of(config)).peak, _item_size(config)
    cached = counting.cached_numbers(config.backbone)
    most = 0.0
    for task, protocol in config.scored:
        how = asked(config, task, protocol, measure)
        rows = max(1, round(budget.tokens / how.row))
        held = peak.of(Shape(rows, how.row, 0)) + budget.logits * size + budget.softmax * 2 * FULL
        written = config.eval_batch_size * how.beams * (how.context + how.written)
        most = max(most, held + cached * size * written * bool(how.written))
    return round(most)


def _item_size(config: RunConfig) -> int:
    return DTYPES[config.dtype].itemsize


def _notes(config: RunConfig, target: Device, by: set[str | None]) -> tuple[str, ...]:
    notes = []
    if None in by:
        notes.append(
            "tokens, and what follows from them, are at most: where data or tokenizer are not at "
            f"hand, a row counts as max_length={config.max_length}"
        )
    if others := sorted(name for name in by if name and name != config.backbone):
        notes.append(
            "tokens are about: the backbone's tokenizer not being at hand, that of "
            f"{', '.join(others)} counted them, in a sample"
        )
    if config.dtype == "float32" and target.name != CPU:
        notes.append("hours are at least: the device's peak is that of bfloat16")
    if config.strategy == "fsdp":
        notes.append("memory leaves out the layer that a device gathers while it computes it")
    return tuple(notes)
