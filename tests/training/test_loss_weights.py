from __future__ import annotations

import pytest
import torch
from torch import Tensor

from furina.errors import DataError
from furina.training.loss import loss_weights, select_answers
from tests.training.helpers import windows


def test_weights_of_all_micro_batches_sum_to_one() -> None:
    window = [select_answers(batch) for batch in windows(1, micro_batch_size=3)[0]]
    found = loss_weights(window, None)
    assert sum(weights.task for weights in found) == pytest.approx(1)
    assert sum(weights.auxiliary for weights in found) == pytest.approx(1)


def test_ranks_share_the_counts_of_the_global_batch() -> None:
    window = [select_answers(batch) for batch in windows(1, micro_batch_size=3)[0]]
    alone, both = loss_weights(window, None), loss_weights(window, lambda counts: 2 * counts)
    for one, half in zip(alone, both, strict=True):
        assert half.task == one.task / 2
        assert half.auxiliary == one.auxiliary


def test_ranks_with_different_numbers_of_micro_batches_are_refused() -> None:
    window = [select_answers(batch) for batch in windows(1, micro_batch_size=3)[0]]

    def add_a_rank_with_one_more(counts: Tensor) -> Tensor:
        size = len(window) + 1
        return counts + torch.tensor([1, size, size**2])

    with pytest.raises(DataError, match="different numbers of micro-batches"):
        loss_weights(window, add_a_rank_with_one_more)
