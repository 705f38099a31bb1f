"""What a run will do, need and take, told without its weights, its hub or its device.

A plan counts what is adapted on the meta device, tokens by a sample of the data where these are at
hand, FLOPs and memory in closed form, and hours by a device's data sheet. It says what is a bound.
Not part of a plan are loading, merging, checkpoints, latency rounds and activity.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from furina.backbones.load import DTYPES
from furina.experiment.activations import MicroBatch
from furina.experiment.config import RunConfig
from furina.experiment.devices import CPU, Device, device
from furina.experiment.flops import forward_flops, step_flops
from furina.experiment.lengths import Lengths, steps_of, training_lengths
from furina.experiment.measures import RATIO_WINDOWS
from furina.experiment.memory import Memory, scoring_memory, training_memory
from furina.experiment.questions import asked, number_asked
from furina.experiment.shapes import Adapted, Decoder, adapted_of, decoder_of
from furina.training.attention import EAGER_UP_TO

DEVICE = "h100-80gb"
CACHE_PASSES = 3
"""How often a written token goes through the keys and values kept: to append to them transformers
reads and writes them all, and attention reads them again."""


@dataclass(frozen=True)
class Plan:
    """What one run comes to.

    Attributes:
        config: the run.
        device: what it is planned for.
        decoder: the backbone's sides.
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
    decoder: Decoder
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
        return tuple(linear.name for linear in self.adapted.linears) if self.adapted else ()

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
    """Plan a run for a device of `furina.experiment.devices`.

    Without `measure` no data is read, and every row taken to be as long as it can be.
    Raises ConfigurationError for what could not run: an unknown backbone, method, option, target,
    task, protocol or device.
    """
    config.check_tasks()
    if config.score_without_router:
        config.adapter_config()  # which looks whether there is one
    target = device(on) if isinstance(on, str) else on
    config = target.resolved(config)
    decoder, found = decoder_of(config.backbone), adapted_of(config)
    lengths = training_lengths(config, measure) if found else None
    training, training_hours, steps = 0, 0.0, 0
    if found and lengths:
        steps = steps_of(config)
        training = _training_flops(config, decoder, found, lengths, steps)
        reached = target.speed(config, micro_rows(config) * lengths.padded)
        training_hours = training / reached.training / 3600
    scoring, scoring_hours, counted = _scoring(config, decoder, found, target, measure)
    by = {*counted, lengths.tokenizer} if lengths else counted
    return Plan(
        config=config,
        device=target,
        decoder=decoder,
        adapted=found,
        steps=steps,
        lengths=lengths,
        training_flops=training,
        scoring_flops=scoring,
        training_hours=training_hours,
        scoring_hours=scoring_hours,
        memory=_memory(config, target, decoder, found, lengths, measure),
        counted_by="" if None in by else ", ".join(sorted(str(name) for name in by)),
        measured=measure,
        notes=_notes(config, target, found, by),
    )


def plan_all(
    configs: Iterable[RunConfig], on: str | Device = DEVICE, measure: bool = True
) -> list[Plan]:
    """Plan each run."""
    target = device(on) if isinstance(on, str) else on
    return [plan(config, target, measure) for config in configs]


def micro_rows(config: RunConfig) -> int:
    """Return the rows of a micro-batch on one device."""
    own = -(-config.batch_size // config.world_size)
    return min(own, config.micro_batch_size or own)


def _training_flops(
    config: RunConfig, decoder: Decoder, found: Adapted, lengths: Lengths, steps: int
) -> int:
    rows = config.batch_size
    one = step_flops(
        *(decoder, found, round(rows * lengths.padded), lengths.padded, rows * lengths.answer),
        checkpointing=config.gradient_checkpointing,
    )
    times = -(-steps // config.validation_interval) if config.validation_interval else 1
    held_out = config.validation_size * times
    looks = forward_flops(
        decoder, found, held_out * lengths.padded, lengths.padded, held_out * lengths.answer
    )
    if found.config.records_selection:  # the last look again, with each linear's own sums
        looks += 2 * looks // times
    if found.config.has_auxiliary_loss:  # a forward and two backward passes each
        looks += round(RATIO_WINDOWS * 1.5 * one)
    return steps * one + looks


def _scoring(
    config: RunConfig, decoder: Decoder, found: Adapted | None, target: Device, measure: bool
) -> tuple[int, float, set[str | None]]:
    """Return FLOPs, hours, which the writing of answers may bound, and whose tokenizers counted."""
    reached, size = target.speed(config), _item_size(config)
    passes = [(found, reached.adapted if found else reached.plain)]
    if found:
        passes += [(None, reached.plain)] * found.config.mergeability().ok
        passes += [(found, reached.adapted)] * config.score_without_router
    flops, reading, writing, by = 0, 0.0, 0.0, set[str | None]()
    for task, protocol in config.scored:
        items, how = number_asked(config, task), asked(config, task, protocol, measure)
        read = items * (how.read(config.engine) + how.written * how.beams)
        answers = items * (how.continued + how.written * how.beams)
        for adapted, rate in passes:
            own = forward_flops(decoder, adapted, read, how.row, answers)
            flops, reading = flops + own, reading + own / rate
        kept = items * how.beams * (how.context + how.written / 2) * decoder.cached
        weights = -(-items // config.eval_batch_size) * decoder.parameters
        moved = how.written * (weights + CACHE_PASSES * kept) * size
        if moved:
            writing += len(passes) * moved / target.reading(config)
        by.add(how.tokenizer)
    return flops, max(reading, writing) / 3600, by


def _memory(
    config: RunConfig,
    target: Device,
    decoder: Decoder,
    found: Adapted | None,
    lengths: Lengths | None,
    measure: bool,
) -> Memory:
    size = _item_size(config)
    shards = config.world_size if config.strategy == "fsdp" else 1
    written = 0.0
    for task, protocol in config.scored:
        how = asked(config, task, protocol, measure)
        rows = config.eval_batch_size * how.beams
        written = max(written, rows * (how.context + how.written) if how.written else 0.0)
    kind = CPU if target.name == CPU else "cuda"
    scoring = scoring_memory(decoder, found, size, round(written), kind)
    if found is None or lengths is None:
        return scoring
    rows = micro_rows(config)
    batch = MicroBatch(
        rows=rows,
        length=lengths.longest,
        answers=lengths.answer,
        item_size=size,
        attention=_attention(config, target, decoder, lengths),
        checkpointing=config.gradient_checkpointing,
        accumulates=rows * config.world_size < config.batch_size,
    )
    training = training_memory(decoder, found, batch, shards)
    return max(training, scoring, key=lambda memory: memory.total)


def _attention(config: RunConfig, target: Device, decoder: Decoder, lengths: Lengths) -> str:
    if config.attention is None and target.name == CPU and lengths.mean <= EAGER_UP_TO:
        return "eager"
    return config.attention or decoder.attention


def _item_size(config: RunConfig) -> int:
    return DTYPES[config.dtype].itemsize


def _notes(
    config: RunConfig, target: Device, found: Adapted | None, by: set[str | None]
) -> tuple[str, ...]:
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
    if found and found.by_formula:
        notes.append(
            f"{found.config.name} cannot be built without weights, so its parameters are by its "
            "closed form"
        )
    if config.dtype == "float32" and target.name != CPU:
        notes.append("hours are at least: the device's peak is that of bfloat16")
    if config.strategy == "fsdp":
        notes.append("memory leaves out the layer that a device gathers while it computes it")
    return tuple(notes)
