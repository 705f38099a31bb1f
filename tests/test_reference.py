"""The reference equations equal loops written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from furina import reference

R, D, K, RANK, T = 4, 5, 3, 2, 6


@pytest.fixture
def experts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((R, RANK, D), (R, K, RANK), (T, D), (R, K))
    a, b, x, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return a, b, x, v


def product(a: Tensor, b: Tensor) -> list[list[float]]:
    return [
        [sum(b[j, s].item() * a[s, i].item() for s in range(RANK)) for i in range(D)]
        for j in range(K)
    ]


def unit_rows(a: Tensor, b: Tensor, eps: float) -> list[list[float]]:
    rows = []
    for row in product(a, b):
        norm = math.sqrt(sum(entry**2 for entry in row) + eps**2)
        rows.append([entry / norm for entry in row])
    return rows


def spoken(a: Tensor, b: Tensor, x: Tensor, eps: float) -> list[list[list[float]]]:
    """Return a_i = Ŵ_i x for every token, expert and output unit."""
    return [
        [
            [sum(row[i] * token[i].item() for i in range(D)) for row in unit_rows(a[e], b[e], eps)]
            for e in range(R)
        ]
        for token in x
    ]


def test_a_direction_has_rows_of_unit_length_and_a_zero_row_stays_zero(experts) -> None:
    a, b, _, _ = experts
    b[0, 1] = 0
    found = reference.direction(a[0], b[0], 1e-6)
    expected = torch.tensor(unit_rows(a[0], b[0], 1e-6), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    norms = found.norm(dim=1)
    assert norms[1] == 0
    torch.testing.assert_close(norms[[0, 2]], torch.ones(2).double(), rtol=1e-11, atol=0)


@pytest.mark.parametrize("per_expert", [False, True])
def test_the_routed_update_is_the_sum_over_experts(experts, per_expert: bool) -> None:
    a, b, x, v = experts
    v = v if per_expert else v[0]
    directions = torch.stack([reference.direction(a[e], b[e], 0.1) for e in range(R)])
    found = reference.routed_update(x, directions, v)
    voices = spoken(a, b, x, 0.1)
    for t in range(T):
        for j in range(K):
            magnitudes = v[:, j].tolist() if per_expert else [v[j].item()] * R
            expected = sum(magnitudes[e] * voices[t][e][j] for e in range(R))
            assert found[t, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_the_shared_update_is_a_scaled_sum_of_plain_experts(experts) -> None:
    a, b, x, _ = experts
    found = reference.shared_update(x, a, b, 2.5)
    for t in range(T):
        for j in range(K):
            expected = sum(
                2.5 * entry * x[t, i].item()
                for e in range(R)
                for i, entry in enumerate(product(a[e], b[e])[j])
            )
            assert found[t, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("kind", ["l2", "l1", "per_unit"])
def test_activity_is_what_its_name_says(experts, kind: str) -> None:
    a, b, x, _ = experts
    eps = 1e-3
    directions = torch.stack([reference.direction(a[e], b[e], eps) for e in range(R)])
    found = reference.activity(x, directions, kind, eps)
    assert found.shape == (T, K if kind == "per_unit" else 1, R)
    for t, voices in enumerate(spoken(a, b, x, eps)):
        for e, voice in enumerate(voices):
            expected = {
                "l2": [math.sqrt(sum(value**2 for value in voice) + eps**2)],
                "l1": [sum(abs(value) for value in voice) + eps],
                "per_unit": [abs(value) + eps for value in voice],
            }[kind]
            assert found[t, :, e].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("units", [1, 3])
def test_the_selection_loss_is_its_definition_in_loops(top_k: int, units: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    loud = torch.rand(T, units, R, generator=generator, dtype=torch.float64) + 0.01
    divergence, balance = reference.selection_loss(loud, top_k)
    share_of_top, chosen, mean_share = 0.0, [0.0] * R, [0.0] * R
    rows = [row for token in loud.tolist() for row in token]
    for row in rows:
        share = [value / sum(row) for value in row]
        top = sorted(range(R), key=lambda e: share[e], reverse=True)[:top_k]
        share_of_top += sum(share[e] for e in top) / len(rows)
        for e in range(R):
            chosen[e] += (e in top) / (top_k * len(rows))
            mean_share[e] += share[e] / len(rows)
    assert divergence.item() == pytest.approx(1 - share_of_top, rel=1e-12)
    expected = R * sum(f * p for f, p in zip(chosen, mean_share, strict=True))
    assert balance.item() == pytest.approx(expected, rel=1e-12)


def test_the_balance_loss_is_one_when_every_expert_is_chosen_equally_often() -> None:
    loud = torch.eye(R, dtype=torch.float64)[:, None] + 0.5
    assert reference.selection_loss(loud, 1)[1].item() == pytest.approx(1.0, rel=1e-14)


def test_one_expert_that_speaks_alone_has_no_divergence_and_the_worst_balance() -> None:
    loud = torch.zeros(T, 1, R, dtype=torch.float64)
    loud[..., 2] = 1
    divergence, balance = reference.selection_loss(loud, 1)
    assert divergence.item() == 0
    assert balance.item() == R


def test_how_often_an_expert_is_chosen_carries_no_gradient() -> None:
    loud = (torch.rand(T, 1, R, dtype=torch.float64) + 0.1).requires_grad_()
    _, balance = reference.selection_loss(loud, 2)
    (found,) = torch.autograd.grad(balance, loud)
    share = loud / loud.sum(-1, keepdim=True)
    top = share.topk(2, -1).indices
    frequency = torch.zeros_like(share).scatter(-1, top, 1.0).mean((0, 1)) / 2
    (expected,) = torch.autograd.grad(R * (frequency.detach() * share.mean((0, 1))).sum(), loud)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
