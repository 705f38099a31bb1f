"""What error.py measures: rounding of weights, logits, changed tokens and answers, drift."""

from __future__ import annotations

import copy
import itertools
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterLinear
from furina.data.encoding import encode_pair
from furina.data.items import Question, data_hash
from furina.data.protocols import ChoiceProtocol, get_protocol
from furina.data.sources import load_items
from furina.data.splits import test_subset
from furina.data.tasks import get_task
from furina.errors import FurinaError
from furina.evaluation.engine import Scorer
from furina.evaluation.samples import predict
from furina.model.state import state_of

CHUNK = 256
"""Positions whose logits are compared at a time, in float64."""


@dataclass(frozen=True)
class Answers:
    """The chosen answer of each question, and the log-likelihood of every choice."""

    chosen: list[int]
    loglikelihoods: list[list[float]]


@dataclass(frozen=True)
class Asked:
    """Tokenised questions: per question its choices as (context, continuation) and their lengths.

    `sequences` are whole texts, each question with its right answer.
    """

    choices: list[list[tuple[list[int], list[int]]]]
    lengths: list[list[int]]
    right: list[int]
    sequences: list[list[int]]


def ask(
    options: Namespace, rows: int, data_dir: Path | None = None
) -> tuple[Asked, dict[str, Any]]:
    """Draw test questions of a task and tokenise them as protocol `text` asks them.

    Also return where they are from.
    """
    items = load_items(options.task, "test", data_dir=data_dir)
    name, drawn = test_subset(items, min(rows, len(items)), options.seed)
    questions = cast(Sequence[Question], drawn)
    tokenizer = furina.load_tokenizer(options.backbone)
    protocol, found = get_protocol("text"), get_task(options.task)
    assert isinstance(protocol, ChoiceProtocol)
    choices = [
        [
            encode_pair(tokenizer, protocol.context(found, question), answer)
            for answer in protocol.answers(found, question)
        ]
        for question in questions
    ]
    right = [question.answer for question in questions]
    whole = [[*itertools.chain(*pairs[index])] for pairs, index in zip(choices, right, strict=True)]
    lengths = [[len(choice) for choice in question.choices] for question in questions]
    data = {"task": options.task, "subset": name, "sha256": data_hash(drawn)}
    return Asked(choices, lengths, right, whole), data


def weight_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the largest |stored − exact| of all pairs, and ‖stored − exact‖/‖exact‖."""
    largest = square = whole = 0.0
    for stored, exact in pairs:
        error = stored.double() - exact
        largest = max(largest, error.abs().max().item())
        square += error.square().sum().item()
        whole += exact.square().sum().item()
    return {"max_abs": largest, "relative": (square / whole) ** 0.5}


def rounding(model: nn.Module) -> dict[str, float]:
    """Return how far a merged model's weights are from W + ΔW in float64.

    `ulps` is the largest entry in units in the last place: 1/2 is one rounding.
    """
    largest = 0.0

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal largest
        for layer in state_of(model).layers.values():
            stored = layer.base.weight.detach()
            exact = layer.pristine_weight.to(stored.device).double() + layer.delta()
            largest = max(largest, ulps(stored, exact))
            yield stored, exact

    return {**weight_difference(pairs()), "ulps": largest}


def ulps(stored: Tensor, exact: Tensor) -> float:
    """Return max |stored − exact| in units in the last place of `stored`'s dtype at `exact`."""
    info = torch.finfo(stored.dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    spacing = info.eps * torch.exp2(exponent.double())
    return ((stored.double() - exact).abs() / spacing).max().item()


@torch.inference_mode()
def logits(model: Any, sequences: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Return the logits after every token, of right-padded batches in the given order.

    Shape: (all tokens, V), in the model's dtype. Raises FurinaError if one is not finite.
    """
    found = []
    for start in range(0, len(sequences), batch_size):
        rows = [torch.tensor(row) for row in sequences[start : start + batch_size]]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
        output = model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
        found.append(output.logits[mask])
    whole = torch.cat(found)
    if not whole.isfinite().all():
        raise FurinaError("The logits are not finite: the dtype overflows.")
    return whole


def exact_logits(model: nn.Module, sequences: Sequence[Sequence[int]], batch_size: int) -> Tensor:
    """Return the logits of the same weights and adapter, unmerged, in float64."""
    return logits(copy.deepcopy(model).double(), sequences, batch_size)


def logit_difference(one: Tensor, other: Tensor, exact: Tensor) -> dict[str, float]:
    """Compare logits position by position. Shape: (n, V) each.

    Return the largest |one − other|, ‖one − other‖/‖exact‖, and at how many of `n` positions the
    likeliest token is another.
    """
    largest, changed = 0.0, 0
    square = whole = 0.0
    tensors: tuple[Any, ...] = (one, other, exact)
    for parts in zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True):
        a, b, reference = (part.double() for part in parts)
        largest = max(largest, (a - b).abs().max().item())
        square += (a - b).square().sum().item()
        whole += reference.square().sum().item()
        changed += int((a.argmax(-1) != b.argmax(-1)).sum())
    relative = (square / whole) ** 0.5
    return {"max_abs": largest, "relative": relative, "changed": changed, "n": len(one)}


def answer(model: Any, asked: Asked, batch_size: int) -> Answers:
    """Choose every question's answer by furina's scoring, exactly `batch_size` rows together."""
    scorer = Scorer(model, model.config.max_position_embeddings, batch_size)
    # Else the budget of a CPU ends a batch earlier.
    scorer.budget = scorer.budget._replace(tokens=2**31, padding=2**31)
    flat = [pair for pairs in asked.choices for pair in pairs]
    values = iter([value for value, _ in scorer.score(flat)])
    likely = [[next(values) for _ in pairs] for pairs in asked.choices]
    chosen = [
        predict(own, lengths, "acc") for own, lengths in zip(likely, asked.lengths, strict=True)
    ]
    return Answers(chosen, likely)


def flips(one: Answers, other: Answers) -> int:
    """Return how many questions are answered otherwise."""
    return sum(a != b for a, b in zip(one.chosen, other.chosen, strict=True))


def loglikelihood_change(one: Answers, other: Answers) -> float:
    """Return the root of the mean squared change of a choice's log-likelihood, in nats."""
    flat = (itertools.chain(*each.loglikelihoods) for each in (one, other))
    squares = [(a - b) ** 2 for a, b in zip(*flat, strict=True)]
    return float((sum(squares) / len(squares)) ** 0.5)


def right(found: Answers, asked: Asked) -> int:
    """Return how many answers are right."""
    return sum(a == b for a, b in zip(found.chosen, asked.right, strict=True))


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differing_bytes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> int:
    """Return in how many bytes tensors of the same names differ."""
    assert before.keys() == after.keys()
    return sum(_differing(old, after[name].detach()) for name, old in before.items())


def _differing(old: Tensor, new: Tensor) -> int:
    one, other = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (old, new))
    return int((one != other).sum())


def drift(model: nn.Module, cycles: int) -> dict[str, int]:
    """Merge and unmerge `model` so many times and count every byte that is not as before.

    `unmerged` are of base weights and adapter, against those before the first merge; `merged` are
    of the weights merged, against the first merge's.
    """
    layers = state_of(model).layers
    start, first = snapshot(_owned(layers)), dict[str, Tensor]()
    unmerged = merged = 0
    for _ in range(cycles):
        furina.merge(model)
        weights = {name: layer.base.weight for name, layer in layers.items()}
        first = first or snapshot(weights)
        merged += differing_bytes(first, weights)
        furina.unmerge(model)
        unmerged += differing_bytes(start, _owned(layers))
    counted = {"linears": len(layers), "cycles": cycles}
    return counted | {"unmerged": unmerged, "merged": merged}


def _owned(layers: Mapping[str, AdapterLinear]) -> dict[str, Tensor]:
    """Return the tensors of adapted linears, bases included."""
    return {
        f"{name}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.state_dict(keep_vars=True).items()
    }
