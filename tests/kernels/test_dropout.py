"""Dropout keeps what it should, scales it back, and follows the seed."""

from __future__ import annotations

import pytest
import torch

from furina.kernels.dropout import dropout

COUNT = 2**20


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9, 1 / 3])
def test_the_share_of_kept_elements_is_one_minus_p(p: float) -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(COUNT), p) != 0).double().mean().item()
    deviation = (p * (1 - p) / COUNT) ** 0.5
    assert abs(kept - (1 - p)) < 4 * deviation


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_kept_is_scaled_to_keep_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1000).to(dtype)
    y = dropout(x, p)
    assert y.dtype == dtype and y.shape == x.shape
    expected = (x.double() / (1 - p)).where(y != 0, 0.0)
    relative = torch.finfo(dtype).eps * 1.01
    torch.testing.assert_close(y.double(), expected, rtol=relative, atol=0)


def test_neighbours_fall_independently() -> None:
    """Gaps are drawn, not elements: each of the 16 patterns of four must be as likely as it is."""
    torch.manual_seed(0)
    p = 0.3
    kept = (dropout(torch.ones(COUNT), p) != 0).view(-1, 4).long()
    patterns = (kept * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    groups = COUNT // 4
    for pattern, count in enumerate(patterns.tolist()):
        alive = pattern.bit_count()
        expected = (1 - p) ** alive * p ** (4 - alive)
        assert abs(count / groups - expected) < 5 * (expected * (1 - expected) / groups) ** 0.5


def test_the_seed_decides() -> None:
    x = torch.randn(7, 13)
    torch.manual_seed(5)
    first = dropout(x, 0.4)
    assert not torch.equal(first, dropout(x, 0.4))
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x, 0.4))


def test_it_is_the_identity_when_off_and_draws_nothing() -> None:
    x, before = torch.randn(5), torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("p", [1 - 2**-20, 1 - 2**-16, 2**-16])
def test_an_extreme_probability_stays_finite(p: float) -> None:
    assert dropout(torch.ones(5000), p).isfinite().all()


def test_the_last_elements_are_dropped_as_often_as_the_first() -> None:
    """More draws are made where the first ones do not reach the end."""
    torch.manual_seed(0)
    p, runs = 0.2, 20_000
    dropped = torch.stack([dropout(torch.ones(12), p) == 0 for _ in range(runs)])
    deviation = (p * (1 - p) / runs) ** 0.5
    assert (dropped.double().mean(0) - p).abs().max() < 5 * deviation


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5, 7), (2, 0, 3)])
def test_any_shape_and_layout_will_do(shape: tuple[int, ...]) -> None:
    assert dropout(torch.ones(shape), 0.5).shape == shape
    assert dropout(torch.ones(6, 4).t(), 0.5).shape == (4, 6)


def test_the_gradient_passes_where_the_input_did() -> None:
    x = torch.ones(100, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
