"""One record of an adapted model's experts: on which tokens of which tasks each is active."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from furina.adapters.mixture import MixtureLinear
from furina.analysis.weights import effective_rank, mean_similarity
from furina.data.batches import Batch, Example, collate, encode_examples
from furina.data.encoding import check_vocabulary
from furina.data.items import Item, data_hash
from furina.data.protocols import get_protocol
from furina.data.splits import test_subset
from furina.data.tasks import get_task
from furina.errors import ConfigurationError
from furina.model.inference import evaluation_mode, logits_at
from furina.model.selection import CHUNK, SelectionSums, choosing, listening, watching
from furina.model.state import AdaptedState, state_of
from furina.progress import advance
from furina.records import (
    ActivityRecord,
    Backbone,
    ExpertWeights,
    TaskActivity,
    TokenExample,
    provenance,
)
from furina.records.activity import layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIGITS = 6
"""Significant digits of a number in the record."""
NO_SHARED = "the method has no shared experts beside routed ones"


class TaskItems(NamedTuple):
    """A task's items, and the protocol that asks them."""

    protocol: str
    items: Sequence[Item]


class _Sample(NamedTuple):
    """The items of one task that are read, as tokens."""

    task: str
    protocol: str
    subset: str
    items: list[Item]
    examples: list[Example]


def analyse(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskItems],
    *,
    backbone: Backbone,
    size: int | None = 64,
    subset_seed: int = 0,
    examples: int = 2,
    batch_size: int = 16,
    max_length: int = 512,
    command: str = "",
) -> ActivityRecord:
    """Read `tasks` with an adapted model and return what its experts did.

    The real tokens of each item, prompt and answer as the protocol trains them, pass the model in
    eval mode; it is left as it was. The record has no suite, task or seed and its row is the
    method: whoever knows better uses `dataclasses.replace`.

    Args:
        model: an adapted model, not merged.
        tokenizer: the backbone's tokenizer.
        tasks: items by task name.
        backbone: what the record says the frozen model is.
        size: items of each task, a fixed subset (`test_subset`); all if None or not so many.
        subset_seed: which subset.
        examples: items of each task whose tokens the record shows one by one.
        batch_size: items of one forward.
        max_length: longest item in tokens; a longer one loses the start of its prompt.
        command: what made the record.

    Raises ConfigurationError if the method has no experts to select from, the adapter is merged, a
    task or protocol is unknown or the two do not fit.
    """
    if not tasks:
        raise ConfigurationError("There is no task to analyse: name at least one.")
    layers, state = choosing(model), state_of(model)
    samples = [
        _sample(tokenizer, task, given, size, subset_seed, max_length)
        for task, given in tasks.items()
    ]
    pad = tokenizer.pad_token_id or 0  # masked
    rows = [(pad,), *(example.input_ids for sample in samples for example in sample.examples)]
    embedding: Any = model.get_input_embeddings()
    check_vocabulary(tokenizer, rows, len(embedding.weight))
    found = [
        _activity(sample, collect(model, _batches(sample.examples, batch_size, pad, model.device)))
        for sample in samples
    ]
    shown = list({layer_of(name): layer for name, layer in layers.items()}.values())
    weights, missing = _weights(state)
    return ActivityRecord(
        suite="",
        row=state.config.name,
        method=state.config.name,
        task="",
        seed=None,
        adapter=state.config.to_dict(),
        backbone=backbone,
        top_k=next(iter(layers.values())).most_active,
        linears=tuple(layers),
        experts=tuple(map(len, found[0].share)),
        tasks=tuple(found),
        weights=weights,
        shown=tuple(layer.name for layer in shown),
        examples=tuple(_examples(model, tokenizer, samples, examples, shown)),
        missing=missing | ({} if found[0].shared_norm else {"shared_part": NO_SHARED}),
        command=command,
        provenance=provenance(),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _sample(
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    given: TaskItems,
    size: int | None,
    seed: int,
    max_length: int,
) -> _Sample:
    found, asked = get_task(task), get_protocol(given.protocol)
    asked.require(found)
    if not asked.trains:
        raise ConfigurationError(
            f"Protocol {asked.name} only evaluates, with prompts of its own: analyse under another."
        )
    whole = size is None or size >= len(given.items)
    subset, items = test_subset(given.items, None if whole else size, seed)
    examples = encode_examples(tokenizer, found, items, asked, max_length)
    if not examples:
        raise ConfigurationError(f"There are no items of {task} to analyse.")
    return _Sample(task, asked.name, subset, items, examples)


def _batches(
    examples: Sequence[Example], batch_size: int, pad_id: int, device: torch.device
) -> Iterator[Batch]:
    """Yield the examples, longest first: neighbours of like length pad little."""
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    for start in range(0, len(ordered), batch_size):
        advance(start, len(ordered), "items")
        batch = collate(ordered[start : start + batch_size], pad_id)
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _activity(sample: _Sample, sums: Mapping[str, SelectionSums]) -> TaskActivity:
    """Divide the sums of every linear by the number of tokens."""
    tokens = sum(len(example.input_ids) for example in sample.examples)
    each = list(sums.values())
    norms = [_loads(linear.norms / tokens) for linear in each]
    shared, routed = zip(*norms, strict=True) if norms[0] else (None, None)
    return TaskActivity(
        task=sample.task,
        protocol=sample.protocol,
        protocol_version=str(get_protocol(sample.protocol).version),
        subset=sample.subset,
        sha256=data_hash(sample.items),
        items=len(sample.examples),
        tokens=tokens,
        top_k_share=tuple(_rounded(linear.top_k_share.item() / tokens) for linear in each),
        entropy=tuple(_rounded(linear.entropy.item() / tokens) for linear in each),
        frequency=tuple(_loads(linear.selected / linear.selected.sum()) for linear in each),
        share=tuple(_loads(linear.share / tokens) for linear in each),
        first=tuple(_loads(linear.first / tokens) for linear in each),
        shared_norm=shared,
        routed_norm=routed,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _loads(values: Tensor) -> tuple[float, ...]:
    return tuple(map(_rounded, values.tolist()))


def _weights(state: AdaptedState) -> tuple[ExpertWeights, dict[str, str]]:
    """Compare the experts of every mixture; with the reason for what cannot be."""
    mixtures = {n: layer for n, layer in state.layers.items() if isinstance(layer, MixtureLinear)}
    similarity: dict[str, float | None] = {}
    for name, layer in mixtures.items():
        b, a = layer.experts()
        if len(b) > 1:
            value = mean_similarity(b, a)
            similarity[name] = None if value is None else _rounded(value)
    alike = tuple(similarity), tuple(similarity.values())
    mergeable = state.config.mergeability()
    if not mergeable.ok:
        reason = f"there is no fixed update, since {mergeable.reason}"
        return ExpertWeights(*alike, None), {"effective_rank": reason}
    ranks = tuple(_rounded(_rank(mixtures[name])) for name in similarity)
    return ExpertWeights(*alike, ranks), {}


def _rank(layer: MixtureLinear) -> float:
    factors = layer.factors()
    assert factors is not None, f"{type(layer).__name__} has experts of low rank"
    return effective_rank(*factors)


def _examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Iterable[_Sample],
    count: int,
    shown: Sequence[MixtureLinear],
) -> Iterator[TokenExample]:
    """Yield the first items of each task, token by token."""
    for sample in samples:
        for example in sample.examples[:count]:
            ids = torch.tensor([example.input_ids], device=model.device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            found = strongest(model, batch, shown)
            best = [found[layer.name] for layer in shown]
            yield TokenExample(
                task=sample.task,
                tokens=tuple(str(tokenizer.decode([token])) for token in example.input_ids),
                answer_length=example.answer_length,
                expert=tuple(tuple(expert.tolist()) for expert, _ in best),
                share=tuple(_loads(share) for _, share in best),
            )


@torch.inference_mode()
def collect(model: nn.Module, batches: Iterable[Batch]) -> dict[str, SelectionSums]:
    """Return the sums over all real tokens of `batches` for each linear of `choosing`.

    The model runs in eval mode and keeps its own. Raises ConfigurationError as `choosing`, and if
    a linear took no part.
    """
    with evaluation_mode(model), watching(model) as found:
        for batch in batches:
            _read(model, batch)
    names = list(choosing(model))
    for name in names:
        if name not in found.sums:
            raise ConfigurationError(
                f"{name} took no part in the forward, so its experts' activity is unknown: leave "
                "it out of the targets."
            )
    return {name: found.sums[name] for name in names}


@torch.inference_mode()
def strongest(
    model: nn.Module, batch: Batch, layers: Collection[MixtureLinear]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each real token's most active expert, and its share, in some linears, by name.

    The shares of output units that weigh apart are averaged. Shape: (T,) each.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(layer: MixtureLinear, x: Tensor) -> None:
        best = [layer.activity(tokens).mean(1).max(-1) for tokens in torch.split(x, CHUNK)]
        expert, share = (torch.cat([one[i] for one in best]) for i in (1, 0))
        found[layer.name] = expert, share

    with evaluation_mode(model), listening(model, layers, keep):
        _read(model, batch)
    return found


def _read(model: nn.Module, batch: Batch) -> None:
    """Run one batch, with the output head at a single position."""
    ids = batch["input_ids"]
    logits_at(model, ids.new_zeros(1), ids, attention_mask=batch["attention_mask"])
