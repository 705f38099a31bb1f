"""An expert's row norms, without its k×d product, to the accuracy that a derived bound promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from furina import reference
from furina.kernels.directions import ExpertOptions, directions

RANK = 3


def row_norm(a: Tensor, b: Tensor, rank: int, num_shared: int, eps: float) -> Tensor:
    """Return d̃ of the routed experts. Shape: A (N·r, I), B (O, N·r) → (O, R)."""
    options = ExpertOptions(len(a) // rank, num_shared, scale=1.0, eps=eps)
    made = directions(a, b.t().contiguous(), b.new_ones(len(b)), options)
    return made.norm[num_shared:].t()


def test_a_row_norm_passes_gradcheck_at_ordinary_tiny_and_zero_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3 * RANK, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 3 * RANK, generator=generator, dtype=torch.float64)
    b[0] = 0
    b[1] *= 1e-3
    for shared in (0, 1):
        assert torch.autograd.gradcheck(
            lambda a, b, shared=shared: row_norm(a, b, RANK, shared, 0.1), (a, b.requires_grad_())
        )


def ill_conditioned(kind: str, rank: int, width: int, generator: torch.Generator) -> Tensor:
    """Return A whose rows are nearly (or exactly) parallel, or of very different lengths."""
    line = torch.randn(1, width, generator=generator)
    noise = torch.randn(rank, width, generator=generator)
    sizes = torch.logspace(-6, 0, rank)[:, None]
    return {
        "parallel": line.expand(rank, width).clone(),
        "nearly parallel": line + 1e-4 * noise,
        "barely apart": line + 1e-7 * noise,
        "of all lengths": sizes * noise,
        "parallel, of all lengths": sizes * line,
    }[kind]


KINDS = (
    "parallel",
    "nearly parallel",
    "barely apart",
    "of all lengths",
    "parallel, of all lengths",
)


def norm_bound(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    """Bound the error of d̃ in a's precision, u its unit roundoff.

    b @ L errs by (r+1) u Σ_i |b_i||a_i| (rows of L are as long as A's), the sum of squares and the
    root by a relative (r/2 + 2) u, and the diagonal added before Cholesky, with Cholesky's own
    backward error, by at most √(8 r ε64) times that same Σ_i |b_i||a_i|.
    """
    rank, unit = a.shape[0], torch.finfo(a.dtype).eps / 2
    length = b.double().abs() @ a.double().norm(dim=1)
    added = math.sqrt(8 * rank * torch.finfo(torch.float64).eps)
    return ((rank + 2) * unit + added) * length + (rank / 2 + 3) * unit * exact


@pytest.mark.parametrize("kind", KINDS)
def test_the_fp32_row_norm_meets_its_error_bound_for_ill_conditioned_experts(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for rank, width in ((2, 7), (5, 64), (16, 300), (64, 300)):
        a = ill_conditioned(kind, rank, width, generator)
        b = torch.randn(40, rank, generator=generator)
        b[:20] -= b[:20].mean(1, keepdim=True)  # nearly orthogonal to what the rows share
        b[30:] /= a.norm(dim=1)
        norm = row_norm(a, b, rank, 0, 1e-6)[:, 0]
        exact = reference.row_norm(b.double() @ a.double(), 1e-6)
        bound = norm_bound(a, b, exact)
        assert ((norm.double() - exact).abs() <= bound).all(), (rank, width)


def test_the_textbook_row_norm_breaks_that_bound() -> None:
    """The bound has teeth: rowsum((B G)∘B) in fp32 is outside it for nearly parallel rows."""
    generator = torch.Generator().manual_seed(0)
    a = ill_conditioned("nearly parallel", 16, 300, generator)
    b = torch.randn(40, 16, generator=generator)
    b -= b.mean(1, keepdim=True)
    exact = reference.row_norm(b.double() @ a.double(), 1e-6)
    naive = ((b @ (a @ a.T)) * b).sum(1).clamp(min=0).add(1e-12).sqrt()
    assert ((naive.double() - exact).abs() > norm_bound(a, b, exact)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gram_matrix_of_a_degenerate_expert_can_always_be_factored(kind: str, dtype) -> None:
    """A factorisation that stops half-way would give a wrong norm without a word."""
    generator = torch.Generator().manual_seed(1)
    for rank, width in ((1, 3), (16, 8), (64, 40), (16, 2000), (64, 4096)):
        a = ill_conditioned(kind, rank, width, generator).to(dtype)
        norm = row_norm(a, torch.eye(rank, dtype=dtype), rank, 0, 1e-18)[:, 0]
        torch.testing.assert_close(norm, a.norm(dim=1), rtol=1e-5, atol=0)
