"""Time greedy generation of a model's variants: fixed lengths, interleaved and paired.

Every round times each variant once, on the same prompt, in a new random order, so that a slow
minute of the machine falls on all of them. Variants are ways of wiring one live model, entered
and left around each measurement.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from operator import truediv
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.model.inference import contiguous_lm_head_input, evaluation_mode
from furina.model.merging import is_merged
from furina.model.state import is_adapted, state_of
from furina.progress import advance
from furina.records import Latency, Spread, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Enter = Callable[[], AbstractContextManager[object]]
"""Makes a context in which the live model is the variant."""
Timer = Callable[[Tensor, int], "Timing"]
"""Generates so many tokens after a prompt (batch, P) and says how long it took."""

BASE = "base"


class Timing(NamedTuple):
    """One generation, in milliseconds: to the first token, per later token (median), in all.

    A token here is one of each row of the batch.
    """

    ttft_ms: float
    per_token_ms: float
    total_ms: float

    @classmethod
    def of_steps(cls, seconds: Sequence[float]) -> Timing:
        """Return the timing of one generation from the seconds of its tokens."""
        return cls(1e3 * seconds[0], 1e3 * statistics.median(seconds[1:]), 1e3 * sum(seconds))


@dataclass(frozen=True)
class LatencyResult:
    """One variant's timings, round by round, and how they compare with the base model's.

    Spreads are in milliseconds; `ratio_to_base` holds the spread of each round's time over the
    base's in that round, by the name of the time, and nothing if no base was timed.
    """

    variant: str
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    rounds: tuple[Timing, ...]
    ttft_ms: Spread
    per_token_ms: Spread
    total_ms: Spread
    ratio_to_base: dict[str, Spread]

    @property
    def tokens_per_second(self) -> float:
        """Return the median round's throughput: new tokens of all rows over the total time."""
        return 1e3 * self.batch_size * self.new_tokens / self.total_ms.median

    def to_record(self, variant: Variant) -> Latency:
        """Return what a run's record keeps."""
        return Latency(
            variant=variant,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            ttft_ms=self.ttft_ms,
            per_token_ms=self.per_token_ms,
            total_ms=self.total_ms,
        )


def measure_latency(
    model: PreTrainedModel,
    variants: Mapping[str, Enter] | None = None,
    *,
    prompt_tokens: int = 100,
    new_tokens: int = 100,
    batch_size: int = 1,
    rounds: int = 20,
    warmup: int = 2,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[LatencyResult]:
    """Time `rounds` generations of each variant of `model` after `warmup` untimed ones.

    Prompts are `batch_size` rows of random tokens, new in each round and the same for all variants;
    exactly `new_tokens` tokens are generated after each, whatever they are. `variants` defaults to
    `adapter_variants(model)`. Seconds are taken from `clock`, after the device has finished. The
    model is timed in eval mode; its modes and wiring come back, and the prompts' generator is its
    own.

    Raises ConfigurationError for fewer than one round, row, prompt token or two new tokens, and if
    the tokens do not fit the model.
    """
    if min(prompt_tokens, new_tokens - 1, batch_size, rounds) < 1 or warmup < 0:
        raise ConfigurationError(
            "Latency needs at least 1 prompt token, 2 new tokens, 1 row and 1 round, and no "
            f"negative warm-up: got {prompt_tokens}, {new_tokens}, {batch_size}, {rounds} and "
            f"{warmup}."
        )
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and prompt_tokens + new_tokens > room:
        raise ConfigurationError(
            f"{prompt_tokens} + {new_tokens} tokens do not fit the model's {room} positions: "
            "time fewer."
        )

    def timed(enter: Enter, prompt: Tensor, new_tokens: int) -> Timing:
        with enter():
            return generate(model, prompt.to(model.device), new_tokens, clock)[1]

    enters = adapter_variants(model) if variants is None else variants
    timers = {name: partial(timed, enter) for name, enter in enters.items()}
    prompts = random_prompts(model, (batch_size, prompt_tokens), seed)
    with evaluation_mode(model), torch.inference_mode():
        timings = interleaved(timers, prompts, new_tokens, rounds=rounds, warmup=warmup, seed=seed)
    base = timings.get(BASE)
    return [
        LatencyResult(
            variant=name,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            rounds=tuple(own),
            ratio_to_base={} if base is None else _ratios(own, base),
            **_spreads(own),
        )
        for name, own in timings.items()
    ]


def random_prompts(
    model: PreTrainedModel, shape: tuple[int, int], seed: int = 0
) -> Iterator[Tensor]:
    """Yield prompts of random tokens without end. Shape: (batch, P)."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    while True:
        yield torch.randint(vocabulary, shape, generator=generator, device="cpu")


def interleaved(
    timers: Mapping[str, Timer],
    prompts: Iterator[Tensor],
    new_tokens: int,
    *,
    rounds: int,
    warmup: int,
    seed: int = 0,
) -> dict[str, list[Timing]]:
    """Time each timer once a round, in a new random order; return what the warm rounds took."""
    order = random.Random(seed)
    timings: dict[str, list[Timing]] = {name: [] for name in timers}
    total = (warmup + rounds) * len(timers)
    for number, prompt in enumerate(itertools.islice(prompts, warmup + rounds)):
        for place, name in enumerate(order.sample(list(timers), len(timers))):
            advance(number * len(timers) + place, total, "generations")
            timing = timers[name](prompt, new_tokens)
            if number >= warmup:
                timings[name].append(timing)
    return timings


def generate(
    model: PreTrainedModel,
    prompt: Tensor,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    static_cache: bool = False,
) -> tuple[Tensor, Timing]:
    """Decode greedily with a key-value cache, without an early stop, and time every token.

    A static cache keeps every step's shapes alike, as a compiled model needs it. What an adapter
    derives from its parameters is made in the first step, or before in `evaluation_mode`.
    Shape: `prompt` is (batch, P); the tokens returned are (batch, `new_tokens`).
    """
    from transformers import DynamicCache, StaticCache

    room = prompt.shape[1] + new_tokens
    config = model.config
    cache = StaticCache(config, max_cache_len=room) if static_cache else DynamicCache(config=config)
    tokens, inputs = [], prompt
    _finish(model.device)
    times = [clock()]
    with evaluation_mode(model), contiguous_lm_head_input(model):
        for _ in range(new_tokens):
            output = model(
                input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            inputs = output.logits[:, -1:].argmax(dim=-1)
            _finish(model.device)
            times.append(clock())
            tokens.append(inputs)
    steps = [after - before for before, after in itertools.pairwise(times)]
    return torch.cat(tokens, dim=1), Timing.of_steps(steps)


def adapter_variants(model: nn.Module) -> dict[str, Enter]:
    """Return the wirings of an adapted model: base, unmerged, and merged if the method merges.

    They share the live model's modules; only the merged weights are made, once, so memory holds
    one copy of the adapted linears more. A model without an adapter has only its base.

    Raises ConfigurationError if the adapter is merged now.
    """
    if not is_adapted(model):
        return {BASE: nullcontext}
    state = state_of(model)
    if is_merged(model):
        raise ConfigurationError("The adapter is merged: call furina.unmerge before timing.")
    layers = state.layers
    variants: dict[str, Mapping[str, nn.Module]] = {
        BASE: {name: layer.base for name, layer in layers.items()},
        "unmerged": dict(layers),
    }
    if state.config.mergeability().ok:
        variants["merged"] = {
            name: _linear(layer.merged_weight(), layer.base.bias) for name, layer in layers.items()
        }
    return {name: partial(_wired, model, modules) for name, modules in variants.items()}


@contextmanager
def _wired(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put `modules` in place of the model's own of those names for a while."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def _linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)
    return linear


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _ratios(own: Sequence[Timing], base: Sequence[Timing]) -> dict[str, Spread]:
    """Divide round by round: what slowed the machine down in a round cancels."""
    pairs = zip(own, base, strict=True)
    return _spreads([Timing(*map(truediv, mine, theirs)) for mine, theirs in pairs])


def _spreads(timings: Sequence[Timing]) -> dict[str, Spread]:
    columns = zip(*timings, strict=True)
    return {name: _spread(times) for name, times in zip(Timing._fields, columns, strict=True)}


def _spread(values: Sequence[float]) -> Spread:
    """Return the median and the quartiles, interpolated linearly."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q1, q3, len(values))
