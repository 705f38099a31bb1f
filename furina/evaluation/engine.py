"""Exact log-likelihoods of many continuations, with everything they share computed once.

A question's choices follow the same prompt. They are scored as one row: the prompt once, then
every choice, each seeing the prompt and itself alone (see `packing`). Only the hidden states that
predict a scored token go through `lm_head`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from furina.errors import ConfigurationError
from furina.evaluation.independence import (
    check_causal,
    differ,
    forget_lengths,
    original_length,
    vocabulary,
)
from furina.evaluation.packing import Ids, Limits, Packing, Tree, batches, to_tensor, tree_mask
from furina.model.inference import logits_at
from furina.progress import advance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Answer = tuple[float, bool]
"""The log-likelihood of a continuation, and whether greedy decoding would give it."""

PAIRS_PER_WIDTH = 2
"""Query-key pairs that cost as much as a token, per hidden unit: 6 by FLOPs, fewer by time."""

LONGEST_ROW = 2048
"""Most nodes of a row that branches: its mask grows with their square."""

PATHS = Packing(price=0, longest=0)
"""Rows without branches."""

TREES = Packing(price=2**31, longest=2**31)
"""Rows that branch wherever they can."""

PROBES, PROBE_LENGTH = 5, 8
"""Size of the self-check: a prefix and four branches, of eight tokens each."""


class Budget(NamedTuple):
    """What a batch may hold on one kind of device.

    `tokens` and `padding` are as in `Limits`; `logits` (predictions times vocabulary) bounds the
    memory of a batch of more than one row, `softmax` that of its copy in fp32.
    """

    tokens: int
    padding: int
    logits: int
    softmax: int


def budget_of(device: torch.device) -> Budget:
    """Return what keeps the device busy and its caches warm."""
    if device.type == "cpu":
        tokens = 256 * torch.get_num_threads()
        return Budget(tokens=tokens, padding=48, logits=2**26, softmax=2**22)
    return Budget(tokens=16384, padding=8192, logits=2**28, softmax=2**26)


class Request(NamedTuple):
    """The tokens that the model reads, and the targets that its last positions predict."""

    inputs: Ids
    targets: Ids


class Scorer:
    """Scores with one model: packed where that is exact, else one sequence per row.

    Args:
        model: a causal language model, adapted, merged or plain.
        max_length: tokens that the model can read; what is longer loses its start.
        batch_size: rows of a batch, at most; None leaves that to the token budget.

    Warns if the model cannot be packed. Raises ConfigurationError if it is not causal.
    """

    def __init__(
        self, model: PreTrainedModel, max_length: int, batch_size: int | None = None
    ) -> None:
        """Check whether the model reads packed rows correctly."""
        check_causal(model)
        self.model, self.max_length, self.batch_size = model, max_length, batch_size
        embedding: Any = model.get_input_embeddings()
        self.vocabulary, width = vocabulary(model), embedding.embedding_dim
        self.budget = budget_of(model.device)
        self.window = _window(model)
        longest = min(LONGEST_ROW, max_length, self.window or LONGEST_ROW)
        self.apart = original_length(model)
        self.packing = Packing(PAIRS_PER_WIDTH * width, longest, self.apart)
        if reason := self._why_not_packed():
            warnings.warn(
                f"{type(model).__name__} scores every choice in a row of its own, which is slower: "
                f"{reason}.",
                stacklevel=3,
            )
            self.packing = replace(PATHS, apart=self.apart)

    def score(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        """Return what `stream` yields, in the order of the requests."""
        answers = dict(self.stream(requests))
        return [answers[index] for index in range(len(requests))]

    def stream(
        self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, Answer]]:
        """Yield the index and the answer of every (context, continuation), batch by batch.

        The model should be in eval mode. An answer does not depend on the order of requests.

        Raises:
            ConfigurationError: an empty context or continuation, one longer than the model can
                read, or a model that does not compute its logits by its output embedding.
        """
        cut = [self._cut(context, continuation) for context, continuation in requests]
        self._warn_of_length(cut)
        rows = self.packing.rows([request.inputs for request in cut])
        reads = [len(request.targets) for request in cut]
        done = 0
        for batch in batches(rows, reads, self._limits()):
            advance(done, len(cut), "answers")
            if self.apart is not None:
                forget_lengths(self.model)
            yield from self._answers(batch, cut)
            done += sum(len(row.members) for row in batch)

    def _limits(self) -> Limits:
        tokens, padding, logits, _ = self.budget
        return Limits(tokens, padding, logits // self.vocabulary, self.batch_size, self.apart)

    def _cut(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ConfigurationError(
                f"A context of {len(context)} and a continuation of {len(continuation)} tokens "
                f"cannot be scored: give at least one each, and at most {self.max_length} to "
                "continue with."
            )
        ids = (*context, *continuation)[-(self.max_length + 1) :]
        return Request(ids[:-1], tuple(continuation))  # the last token is only predicted

    def _answers(
        self, batch: Sequence[Tree], requests: Sequence[Request]
    ) -> Iterator[tuple[int, Answer]]:
        width = max(map(len, batch))
        slots: dict[int, int] = {}  # flat position → row of lm_head, each once
        members: list[int] = []
        reads: list[int] = []
        targets: list[int] = []
        for number, row in enumerate(batch):
            for member, path in zip(row.members, row.paths, strict=True):
                wanted = requests[member].targets
                nodes = path[len(path) - len(wanted) :]
                members.append(member)
                reads += [slots.setdefault(number * width + n, len(slots)) for n in nodes]
                targets += wanted
        values, greedy = self._read(batch, list(slots), reads, targets)
        start = 0
        for member in members:
            stop = start + len(requests[member].targets)
            yield member, (math.fsum(values[start:stop]), all(greedy[start:stop]))
            start = stop

    @torch.inference_mode()
    def _read(
        self, batch: Sequence[Tree], slots: list[int], reads: list[int], targets: list[int]
    ) -> tuple[list[float], list[bool]]:
        """Return log p of every target at its slot, and whether it is the likeliest token there."""
        device = self.model.device
        at, wanted = torch.tensor([reads, targets], device=device)
        logits = self._logits(batch, torch.tensor(slots, device=device))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalisers, best = [], []
        for part in torch.split(logits, max(1, self.budget.softmax // logits.shape[-1])):
            wide = part.to(dtype)
            normalisers.append(wide.logsumexp(-1))
            best.append(wide.argmax(-1))
        values = logits[at, wanted].to(dtype) - torch.cat(normalisers)[at]
        greedy = torch.cat(best)[at] == wanted
        both = torch.stack([values, greedy.to(dtype)]).tolist()  # the batch's one transfer back
        return both[0], [bool(flag) for flag in both[1]]

    def _logits(self, batch: Sequence[Tree], slots: Tensor) -> Tensor:
        """Run the model on a batch, `lm_head` at n flat positions only. Shape: (n,) → (n, V)."""
        ids, depths, ends = to_tensor(batch).to(self.model.device, non_blocking=True)
        # Without branches a causal mask is enough: right padding comes after all that is read.
        inputs: dict[str, Tensor] = {}
        if any(row.branches for row in batch):
            mask = tree_mask(ends, self.model.dtype)
            inputs = {"attention_mask": mask, "position_ids": depths}
        return logits_at(self.model, slots, ids, **inputs)

    def _why_not_packed(self) -> str | None:
        """Return why rows are not packed, None if a small group scores the same packed and plain.

        Wrong positions cost half the spread of log-probabilities and more, rounding much less.
        """
        attention = str(getattr(self.model.config, "_attn_implementation", ""))
        if attention.startswith(("flash", "flex", "paged")):
            return f"its attention {attention!r} takes no mask of a tree of tokens"
        plain = self._probe(PATHS)
        if not plain.isfinite().all():
            return None  # whoever reads the scores will say so
        try:
            packed = self._probe(TREES)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            return f"it takes no tree of tokens ({type(error).__name__})"
        difference = differ(self.model, packed, plain)
        if difference is None:
            return None
        return f"packed, a small group's log-probabilities differ by {difference:.1e}"

    def _probe(self, packing: Packing) -> Tensor:
        """Return log-probabilities of single tokens after branches of one prefix."""
        generator = torch.Generator().manual_seed(0)
        shape = (PROBES, max(1, min(PROBE_LENGTH, self.max_length // 2)))
        first, *others = torch.randint(
            self.vocabulary, shape, generator=generator, device="cpu"
        ).tolist()
        requests = [
            Request((*first, *branch[:end]), (branch[(end + 1) % len(branch)],))
            for branch in others
            for end in range(1, len(branch) + 1)
        ]
        rows = packing.rows([request.inputs for request in requests])
        answers = dict(
            pair
            for batch in batches(rows, [1] * len(requests), self._limits())
            for pair in self._answers(batch, requests)
        )
        values = [answers[index][0] for index in range(len(requests))]
        return torch.tensor(values, dtype=torch.float64)

    def _warn_of_length(self, requests: Sequence[Request]) -> None:
        if self.apart is not None and any(len(each.inputs) > self.apart for each in requests):
            warnings.warn(
                f"Prompts longer than {self.apart} tokens are scored one at a time, because the "
                "model's rope scaling takes its frequencies from the longest of a batch.",
                stacklevel=4,
            )
        if self.window and any(len(request.inputs) > self.window for request in requests):
            warnings.warn(
                f"Prompts longer than the model's attention window of {self.window} tokens are "
                "scored in rows of their own, which is slower.",
                stacklevel=4,
            )


def _window(model: PreTrainedModel) -> int | None:
    """Return the span of the model's local attention; None if every layer attends to all."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["unknown"])
    if kinds == {"full_attention"}:
        return None
    names = ("sliding_window", "attention_chunk_size", "window_size")
    return min((span for name in names if (span := getattr(config, name, None))), default=None)
