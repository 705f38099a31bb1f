"""Cosines and effective ranks from small forms, against the products that they avoid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from furina.adapters.mixture import MixtureLinear
from furina.analysis.weights import cosines, effective_rank, mean_similarity
from tests.analysis import naive
from tests.helpers import layer_of, methods, perturb_layer, small, variants

EXPERTS = [name for name in methods() if isinstance(layer_of(small(name)), MixtureLinear)]
EXPERTS += ["mixlora"]  # its experts are in FFNs alone


def factors(n: int, o: int, r: int, i: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(n, o, r, generator=generator, dtype=torch.float64)
    return b, torch.randn(n, r, i, generator=generator, dtype=torch.float64)


def expected_cosine(one: Tensor, other: Tensor) -> float:
    return (one * other).sum().item() / (one.norm() * other.norm()).item()


@pytest.mark.parametrize("sides", [(7, 3, 11), (5, 1, 4), (3, 6, 2)])
def test_cosines_are_those_of_the_full_products(sides: tuple[int, int, int]) -> None:
    b, a = factors(4, *sides)
    found = cosines(b, a)
    for i in range(4):
        for j in range(4):
            expected = expected_cosine(b[i] @ a[i], b[j] @ a[j])
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_similarity_is_the_mean_over_pairs_without_their_sign() -> None:
    b, a = factors(3, 7, 2, 11)
    b[1], a[1] = -b[0], a[0]
    products = [b[i] @ a[i] for i in range(3)]
    pairs = [abs(expected_cosine(products[i], products[j])) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert pairs[0] == pytest.approx(1)
    assert mean_similarity(b, a) == pytest.approx(sum(pairs) / 3)


def test_an_expert_without_an_update_is_left_out() -> None:
    b, a = factors(3, 7, 2, 11)
    b[1] = 0
    expected = abs(expected_cosine(b[0] @ a[0], b[2] @ a[2]))
    assert mean_similarity(b, a) == pytest.approx(expected)
    b[2] = 0
    assert mean_similarity(b, a) is None


@pytest.mark.parametrize("sides", [(9, 4, 13), (13, 4, 9), (6, 10, 5), (7, 1, 7)])
def test_the_effective_rank_is_that_of_the_full_products_singular_values(
    sides: tuple[int, int, int],
) -> None:
    b, a = (each[0] for each in factors(1, *sides))
    sigma = torch.linalg.svd(b @ a).S.tolist()
    parts = [s / sum(sigma) for s in sigma]
    expected = math.exp(-sum(q * math.log(q) for q in parts if q > 1e-15))
    assert effective_rank(b, a) == pytest.approx(expected, rel=1e-9)


def test_the_effective_rank_of_equal_directions_of_one_and_of_none() -> None:
    b, a = torch.eye(9, 4, dtype=torch.float64), torch.eye(4, 6, dtype=torch.float64)
    assert effective_rank(b, a) == pytest.approx(4)
    assert effective_rank(b[:, :1].repeat(1, 4), a) == pytest.approx(1)
    assert effective_rank(0 * b, a) == 0


@pytest.mark.parametrize("method", EXPERTS)
def test_a_methods_experts_are_those_of_its_parameters(method: str) -> None:
    for config in variants(method, together=1):
        if method == "furina" and config.num_routed_experts < 2:
            continue
        layer = layer_of(config) if method != "mixlora" else mixed(config)
        perturb_layer(layer)
        assert isinstance(layer, MixtureLinear)
        b, a = layer.experts()
        products = naive.matrices(layer)
        assert b.dtype == a.dtype == torch.float64
        assert len(products) == len(b) > 1
        for i, product in enumerate(products):
            scale = (b[i] @ a[i]).norm() / product.norm()
            torch.testing.assert_close(b[i] @ a[i], scale * product, rtol=1e-9, atol=1e-11)
        pairs = [
            abs(expected_cosine(products[i], products[j]))
            for i in range(len(products))
            for j in range(i)
        ]
        assert mean_similarity(b, a) == pytest.approx(sum(pairs) / len(pairs), rel=1e-9)


def mixed(config: object) -> MixtureLinear:
    """Return the up linear of an FFN, which has experts and no router."""
    from tests.adapters.blocks import mixed_ffn

    return mixed_ffn(config).up_proj  # type: ignore[arg-type, return-value]
