"""Record of which experts are active: where, on which tasks, how evenly, and how alike they are.

Numbers stand linear by linear. What follows from the loads alone is computed here, by one formula.

Notation of one linear: p_ti the share of expert i in the activity of token t, N experts, T tokens,
K experts called most active (all of them where there are not more), and

    F_i = (1/(K·T)) Σ_t 1[i is among the K largest p_t]        the load: Σ_i F_i = 1
    P_i = (1/T) Σ_t p_ti                                       the mean share: Σ_i P_i = 1
    E_i = (1/T) Σ_t 1[i has the largest p_t]                   how often it comes first: Σ_i E_i = 1
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from furina.records import codec
from furina.records.codec import RecordError
from furina.records.environment import Provenance
from furina.records.runs import Backbone

ACTIVITY_SCHEMA = 1

Loads = tuple[tuple[float, ...], ...]
"""A number per expert, for each linear."""


@dataclass(frozen=True)
class TaskActivity:
    """What the experts do on the real tokens of a task's items, prompts and answers.

    Lists have an entry per linear of the record. `top_k_share` is mean_t Σ_{K largest} p_ti, in
    [K/N, 1]; `entropy` is mean_t of −Σ_i p_ti log p_ti / log N, in [0, 1]; `frequency`, `share` and
    `first` are F, P and E. `shared_norm` and `routed_norm` are mean_t |Σ Δy_t| over the shared and
    over the routed experts; null, with the reason in the record's `missing`, if it has not both.
    `sha256` is that of the items that were read, which `subset` names.
    """

    task: str
    protocol: str
    protocol_version: str
    subset: str
    sha256: str
    items: int
    tokens: int
    top_k_share: tuple[float, ...]
    entropy: tuple[float, ...]
    frequency: Loads
    share: Loads
    first: Loads
    shared_norm: tuple[float, ...] | None
    routed_norm: tuple[float, ...] | None

    @property
    def balance(self) -> tuple[float, ...]:
        """N Σ_i F_i P_i: 1 where load or share is even, up to N/K where they fall together."""
        pairs = zip(self.frequency, self.share, strict=True)
        return tuple(len(f) * sum(a * b for a, b in zip(f, p, strict=True)) for f, p in pairs)

    @property
    def load_variation(self) -> tuple[float, ...]:
        """The load's coefficient of variation, sqrt(mean_i (F_i − 1/N)²) · N: 0 if it is even."""
        return tuple(statistics.pstdev(f) / statistics.fmean(f) for f in self.frequency)

    @property
    def busiest(self) -> tuple[float, ...]:
        """max_i F_i, the busiest expert's share of the load: from 1/N to 1/K."""
        return tuple(map(max, self.frequency))

    @property
    def shared_part(self) -> tuple[float | None, ...] | None:
        """shared_norm / (shared_norm + routed_norm); null where both are 0."""
        if self.shared_norm is None or self.routed_norm is None:
            return None
        norms = zip(self.shared_norm, self.routed_norm, strict=True)
        return tuple(s / (s + r) if s + r else None for s, r in norms)


@dataclass(frozen=True)
class ExpertWeights:
    """How alike the experts' updates are, and how many directions their sum ΔW has.

    Lists have an entry per linear of `linears`, which are all that have experts, a router or not.
    `similarity` is the mean over pairs i < j of |⟨W_i, W_j⟩| / (|W_i| |W_j|), Frobenius, with W_i
    the update of expert i (FURINA's: its direction Ŵ_i); null if less than two are not zero.
    `effective_rank` is exp(−Σ_m q_m log q_m), q_m = σ_m / Σ σ with the singular values of ΔW (Roy
    and Vetterli 2007), and 0 where ΔW = 0; null, with the reason in the record's `missing`, for
    a method without a fixed ΔW.
    """

    linears: tuple[str, ...]
    similarity: tuple[float | None, ...]
    effective_rank: tuple[float, ...] | None


@dataclass(frozen=True)
class TokenExample:
    """The most active expert, counted from 0, of every token of one item, and its share.

    `expert` and `share` have a list per linear of the record's `shown`; the last `answer_length`
    tokens are the answer.
    """

    task: str
    tokens: tuple[str, ...]
    answer_length: int
    expert: tuple[tuple[int, ...], ...]
    share: Loads


@dataclass(frozen=True)
class ActivityRecord(codec.Record):
    """The experts' activity of one adapter on one or more tasks.

    `task` and `seed` say what it was trained on, empty and null if that is not known; `adapter` is
    its method's options and `dtype` the weights' number format, null in old records. `linears` are
    those whose tokens choose among experts, of which `experts`
    counts each one's; `shown` is one of them per layer. `missing` has the reason of each number
    that cannot be, by the name of its field.
    """

    suite: str
    row: str
    method: str
    task: str
    seed: int | None
    adapter: dict[str, object]
    backbone: Backbone
    top_k: int
    linears: tuple[str, ...]
    experts: tuple[int, ...]
    tasks: tuple[TaskActivity, ...]
    weights: ExpertWeights
    shown: tuple[str, ...]
    examples: tuple[TokenExample, ...]
    missing: dict[str, str]
    command: str
    provenance: Provenance
    dtype: str | None = codec.later(None)
    schema: int = ACTIVITY_SCHEMA

    def __post_init__(self) -> None:
        """Raise RecordError where a list does not have an entry for each linear, or expert."""
        for what, found, expected in self._lengths():
            if found != expected:
                raise RecordError(
                    f"The activity record of {self.row} has {found} entries in {what}, not "
                    f"{expected}: analyse the adapter again."
                )

    def _lengths(self) -> Iterator[tuple[str, int, int]]:
        """Yield (what, entries, entries that there must be)."""
        yield "experts", len(self.experts), len(self.linears)
        for task in self.tasks:
            lists = (task.top_k_share, task.entropy, task.shared_norm, task.routed_norm)
            for values in (*filter(None, lists), *task_loads(task)):
                yield f"a list of {task.task}", len(values), len(self.linears)
            for loads in task_loads(task):
                for values, count in zip(loads, self.experts, strict=False):
                    yield f"a load of {task.task}", len(values), count
        for values in filter(None, (self.weights.similarity, self.weights.effective_rank)):
            yield "a list of weights", len(values), len(self.weights.linears)
        for example in self.examples:
            for rows in (example.expert, example.share):
                yield f"an example of {example.task}", len(rows), len(self.shown)
                for row in rows:
                    yield f"an example of {example.task}", len(row), len(example.tokens)

    @property
    def file_name(self) -> str:
        """Return the record's file name inside its suite's folder of activities."""
        parts = [self.row, self.task, "" if self.seed is None else f"seed{self.seed}"]
        return f"{'--'.join(filter(None, parts))}.json"

    @property
    def even_top_k_share(self) -> tuple[float, ...]:
        """K/N of each linear: the top-K share of experts that are all equally active."""
        return tuple(min(self.top_k, n) / n for n in self.experts)

    def overlap(self, first: TaskActivity, second: TaskActivity) -> tuple[float, ...]:
        """Return each linear's 1 − ½ Σ_i |F_i(first) − F_i(second)|, in [0, 1].

        It is the load that the two tasks put on the same experts: 1 less the total variation
        distance of the loads.
        """
        pairs = zip(first.frequency, second.frequency, strict=True)
        return tuple(1 - sum(abs(a - b) for a, b in zip(f, g, strict=True)) / 2 for f, g in pairs)

    def task_information(self) -> tuple[float, ...] | None:
        """Return each linear's I(task; first expert) / log(number of tasks); None for one task.

        It is the part of the uncertainty about a token's task that its most active expert removes
        (Theil's uncertainty coefficient), every task counting alike: 0 if the expert does not
        depend on the task, 1 if no two tasks have an expert in common, which takes as many
        experts as tasks. I = H(mean over tasks of E) − mean over tasks of H(E).
        """
        if not self.several_tasks:
            return None
        linears = zip(*(task.first for task in self.tasks), strict=True)
        return tuple(map(_information, linears))

    def chance_information(self) -> tuple[float, ...] | None:
        """Return what `task_information` would be, on average, of tasks that do not differ.

        E is counted on finitely many tokens, T_a of task a, so no two tasks' are ever equal. With
        independent tokens and A tasks it is ½ (N − 1) · mean_a(1/T_a) · (1 − 1/A) / log A (Miller
        1955); the tokens of one item are alike, so that chance gives rather more.
        """
        if not self.several_tasks:
            return None
        a = len(self.tasks)
        rate = statistics.fmean(1 / task.tokens for task in self.tasks) * (1 - 1 / a)
        return tuple((n - 1) / 2 * rate / math.log(a) for n in self.experts)

    @property
    def several_tasks(self) -> bool:
        """Whether there are tasks to compare."""
        return len(self.tasks) > 1


def task_loads(task: TaskActivity) -> tuple[Loads, Loads, Loads]:
    """Return what a task has a number per expert of."""
    return task.frequency, task.share, task.first


def layer_of(linear: str) -> int:
    """Return the number of the layer that a linear is in, by its name; 0 if there is none."""
    return next((int(part) for part in linear.split(".")[:-1] if part.isdigit()), 0)


def kind_of(linear: str) -> str:
    """Return what a linear is called within its layer, such as up_proj."""
    return linear.rpartition(".")[2]


def _information(first: Sequence[Sequence[float]]) -> float:
    """Return the uncertainty coefficient of one linear from each task's E."""
    pooled = [statistics.fmean(shares) for shares in zip(*first, strict=True)]
    information = _entropy(pooled) - statistics.fmean(map(_entropy, first))
    return max(0.0, information) / math.log(len(first))  # rounding may leave −1e-17


def _entropy(shares: Sequence[float]) -> float:
    return -sum(share * math.log(share) for share in shares if share)
