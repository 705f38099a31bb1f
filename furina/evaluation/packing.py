"""Pack token sequences as trees, in which a shared prefix stands once.

A row holds the nodes of one tree in depth-first order, so the descendants of node j are the nodes
from j up to `ends[j]`: node i may attend to j exactly if j <= i < ends[j].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Ids = tuple[int, ...]


@dataclass
class Tree:
    """One tree of tokens; `paths[k]` leads from its root to the end of the sequence `members[k]`.

    `depths` are the nodes' positions in their sequences, `ends` where their descendants end.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    members: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self.tokens)

    @property
    def branches(self) -> bool:
        """Return whether the tree is more than one path."""
        return min(self.ends) < len(self)

    def add(self, member: int, ids: Ids, shared: int) -> None:
        """Add a sequence that has its first `shared` tokens in common with the one before."""
        before, size = len(self), len(self) + len(ids) - shared
        path = [*(self.paths[-1][:shared] if shared else []), *range(before, size)]
        self.tokens += ids[shared:]
        self.depths += range(shared, len(ids))
        self.ends += [size] * (size - before)
        for node in path[:shared]:
            self.ends[node] = size
        self.members.append(member)
        self.paths.append(path)


@dataclass(frozen=True)
class Packing:
    """When two sequences share a row.

    Args:
        price: how many query-key pairs cost as much as one more token.
        longest: nodes of a row that branches, at most; with 0 no row does.
        apart: sequences longer than this share no row; None for no such length.
    """

    price: int
    longest: int
    apart: int | None = None

    def rows(self, sequences: Sequence[Ids]) -> list[Tree]:
        """Pack all sequences, whatever their order, into as few tokens as pays off.

        Neighbours in lexicographic order share most; what a sequence shares with the one before
        is then what it shares with the whole tree.
        """
        rows: list[Tree] = []
        last: Ids = ()
        for member in sorted(range(len(sequences)), key=sequences.__getitem__):
            ids = sequences[member]
            shared = common_prefix(last, ids)
            if not rows or not self._joins(rows[-1], last, ids, shared):
                rows.append(Tree())
                shared = 0
            rows[-1].add(member, ids, shared)
            last = ids
        return rows

    def _joins(self, row: Tree, last: Ids, ids: Ids, shared: int) -> bool:
        if self.apart is not None and max(len(last), len(ids)) > self.apart:
            return False
        if shared == len(last) and not row.branches:
            return True  # longer along the same path: an ordinary causal row
        size = len(row) + len(ids) - shared
        more_pairs = size**2 - len(row) ** 2 - len(ids) ** 2
        return size <= self.longest and more_pairs < self.price * shared


def common_prefix(first: Ids, second: Ids) -> int:
    """Return how many tokens both sequences start with."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


@dataclass(frozen=True)
class Limits:
    """What a batch of more than one row may hold.

    Args:
        tokens: tokens, padding included.
        padding: padding; one more batch costs about as much.
        reads: predictions.
        rows: rows; None for no limit.
        apart: rows longer than this share no batch; None for no such length.
    """

    tokens: int
    padding: int
    reads: int
    rows: int | None = None
    apart: int | None = None


def batches(rows: Sequence[Tree], reads: Sequence[int], limits: Limits) -> Iterator[list[Tree]]:
    """Yield the rows, longest first, in batches; `reads[m]` predictions are taken of sequence m.

    Rows that branch and rows that do not are never together: the latter need no mask.
    """
    for branching in (True, False):
        own = [row for row in rows if row.branches is branching]
        yield from _batches(sorted(own, key=len, reverse=True), reads, limits)


def _batches(rows: Sequence[Tree], reads: Sequence[int], limits: Limits) -> Iterator[list[Tree]]:
    batch: list[Tree] = []
    padding = read = 0
    for row in rows:
        width = len(batch[0]) if batch else len(row)
        padding += width - len(row)
        read += (wanted := sum(reads[member] for member in row.members))
        full = (
            width * (len(batch) + 1) > limits.tokens
            or padding > limits.padding
            or read > limits.reads
            or len(batch) == limits.rows
            or (limits.apart is not None and width > limits.apart)
        )
        if batch and full:
            yield batch
            batch, padding, read = [], 0, wanted
        batch.append(row)
    if batch:
        yield batch


def to_tensor(batch: Sequence[Tree]) -> Tensor:
    """Return token ids, depths and ends of right-padded rows. Shape: (3, B, T).

    A padding node has no descendants and no ancestors: it sees itself alone.
    """
    width = max(map(len, batch))
    return torch.tensor(
        [
            [row.tokens + [0] * (width - len(row)) for row in batch],
            [row.depths + [0] * (width - len(row)) for row in batch],
            [row.ends + list(range(len(row) + 1, width + 1)) for row in batch],
        ]
    )


def tree_mask(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a node sees itself or an ancestor, else the lowest number of `dtype`.

    Shape: (B, T) → (B, 1, T, T), with queries before keys.
    """
    keys = torch.arange(ends.shape[1], device=ends.device)
    queries = keys[:, None]
    visible = (keys <= queries) & (queries < ends[:, None, :])
    hidden = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=ends.device)
    return torch.where(visible, torch.zeros_like(hidden), hidden)[:, None]
