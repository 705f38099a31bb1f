"""The fused product is its equation, forward and backward, however its parts are drawn and kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from furina.adapters.base import AdapterLinear
from furina.kernels import product
from furina.kernels.directions import ExpertOptions, direction_gram, directions, l2_activity
from furina.kernels.dropout import drop_
from furina.kernels.product import low_rank_product
from furina.model.state import state_of
from tests.adapters.blocks import mixed_ffn
from tests.helpers import layer_of, perturb_layer, small

IN, OUT, RANK, EXPERTS, TOKENS = 5, 4, 2, 3, 6
CASES = [
    (shared, gated, masked, bias, by_columns)
    for shared, gated in ((False, False), (False, True), (True, True))
    for masked in (None, "places", "boolean")
    for bias, by_columns in ((False, False), (True, True))
]
SERVED_AS_A_PAIR = [
    "dora",
    "flylora",
    "furina",
    "hydralora",
    "lora",
    "loramoe",
    "mola",
    "molora",
    "slim",
]
"""Methods that serve a token with A and B as they stand; MixLoRA's blocks have a test of theirs."""


def tensors(shared: bool, bias: bool, by_columns: bool) -> tuple[nn.Linear, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    base = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64).requires_grad_(False)
    rows = RANK if shared else EXPERTS * RANK
    b = draw(EXPERTS * RANK, OUT) if by_columns else draw(OUT, EXPERTS * RANK)
    return base, {
        "x": draw(2, TOKENS // 2, IN),
        "a": draw(rows, IN),
        "b": b,
        "gates": draw(2, TOKENS // 2, EXPERTS),
    }


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(("shared", "gated", "masked", "bias", "by_columns"), CASES)
def test_the_product_and_its_gradients(
    shared: bool, gated: bool, masked: str | None, bias: bool, by_columns: bool, hooked, monkeypatch
) -> None:
    base, parts = tensors(shared, bias, by_columns)
    if hooked:  # the linear is then called itself
        base.register_forward_hook(lambda *_: None)
    kept = torch.rand(TOKENS, IN, generator=torch.Generator().manual_seed(1)) > 0.4
    dropped = ~kept if masked == "boolean" else (~kept).flatten().nonzero().squeeze(1)
    monkeypatch.setattr(product, "draw_dropped", lambda x, p: dropped)
    monkeypatch.setattr(product, "drop", lambda x, p: x * kept.view_as(x) / (1 - p) if p else x)
    p = 0.4 if masked else 0.0

    def fused(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        b = b.t() if by_columns else b
        given = gates if gated else None
        return low_rank_product(base, x, a, b, scale=1.7, gates=given, dropout=p)

    def equation(x: Tensor, a: Tensor, b: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        b = b.t() if by_columns else b
        seen = x * kept.view_as(x) / (1 - p) if masked else x
        h = functional.linear(seen, a) * 1.7
        weight = gates if gated else torch.ones_like(gates)
        z = h.unflatten(-1, (-1, RANK)) * weight[..., None]
        return base(x) + functional.linear(z.flatten(-2), b), h.flatten(0, -2)

    inputs = tuple(parts.values())
    found, expected = fused(*inputs), equation(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    weights = [torch.randn_like(each) for each in expected]
    for used in ((0, 1), (0,), (1,)):  # an output that nothing uses sends no gradient
        total, exact = (
            sum((outputs[i] * weights[i]).sum() for i in used) for outputs in (found, expected)
        )
        one, other = (
            torch.autograd.grad(each, inputs, retain_graph=True, materialize_grads=True)
            for each in (total, exact)
        )
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_it_saves_neither_a_dropped_input_nor_gated_copies() -> None:
    """Saved for the backward: x, W, A and B in its dtype, h, gates and the few dropped places."""
    base = nn.Linear(64, 48).requires_grad_(False)
    x, gates = torch.randn(256, 64, requires_grad=True), torch.rand(256, 4)
    a, b = (nn.Parameter(torch.randn(shape)) for shape in ((32, 64), (48, 32)))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, h = low_rank_product(base, x, a, b, gates=gates, dropout=0.1)
    sizes = sorted(t.numel() for t in saved if t.is_floating_point())
    expected = [x, base.weight, a, b, gates, h]
    assert sizes == sorted(each.numel() for each in expected)
    places = [t for t in saved if not t.is_floating_point()]
    assert sum(t.numel() for t in places) < 2 * 0.1 * x.numel()


@pytest.mark.parametrize("dense", [0, 256])
@pytest.mark.parametrize("detach_norm", [False, True])
@pytest.mark.parametrize("num_shared", [0, 1])
def test_directions_and_activity_pass_gradcheck(
    dense: int, detach_norm: bool, num_shared: int, monkeypatch
) -> None:
    """As one function of A, B, v and h, by blocks and dense, with several linears to a chunk."""
    monkeypatch.setattr("furina.kernels.directions.DENSE", dense)
    monkeypatch.setattr("furina.kernels.directions.CHUNK", 2)
    generator = torch.Generator().manual_seed(0)
    shapes = (EXPERTS * RANK, IN), (EXPERTS * RANK, OUT), (OUT,), (3, TOKENS, EXPERTS * RANK)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    options = ExpertOptions(EXPERTS, num_shared, scale=1.5, eps=0.1)

    def function(a: Tensor, bt: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        made = directions(a, bt, v, options, with_gram=True)
        moved = torch.tensor([True, False, True])
        activity = l2_activity(h.unbind(), (made.gram,) * 3, 0.1, moved)
        return made.b, made.norm[num_shared:], activity[::2, :, num_shared:]

    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(function, tuple(inputs))
    a, bt, v, _ = inputs
    made = directions(a, bt, v, options._replace(detach_norm=detach_norm), with_gram=True)
    gram = direction_gram(inputs[1], made.norm, num_shared)
    torch.testing.assert_close(made.gram, gram, rtol=1e-12, atol=1e-13)
    assert not made.gram[:num_shared].any()


def test_a_linear_whose_activity_has_no_gradient_gets_none() -> None:
    h, gram = torch.randn(2, TOKENS, 4, requires_grad=True), torch.eye(2).expand(2, 2, 2, 2)
    activity = l2_activity(h.unbind(), gram.unbind(), 1e-6, torch.tensor([True, False]))
    (found,) = torch.autograd.grad(activity.sum(), h)
    assert found[0].all() and not found[1].any()


def test_dropping_in_place_takes_places_and_masks() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    for dropped in (mask, mask.flatten().nonzero().squeeze(1)):
        assert drop_(torch.ones(2, 2), dropped).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(("shared", "gated"), [(False, False), (False, True), (True, True)])
def test_without_gradients_it_is_the_same_to_the_bit(shared: bool, gated: bool) -> None:
    base, parts = tensors(shared, bias=True, by_columns=False)
    given = {"scale": 1.7, "gates": parts["gates"] if gated else None}
    with_gradient = low_rank_product(base, parts["x"], parts["a"], parts["b"], **given)
    assert with_gradient.y.requires_grad
    with torch.no_grad():
        without = low_rank_product(base, parts["x"], parts["a"], parts["b"], **given)
    assert not without.y.requires_grad
    assert torch.equal(without.y, with_gradient.y) and torch.equal(without.h, with_gradient.h)


@pytest.mark.parametrize("gated", [False, True])
def test_a_single_16_bit_token_rounds_its_update_once(gated: bool) -> None:
    base, parts = tensors(shared=False, bias=False, by_columns=False)
    base.weight.zero_()
    base.to(torch.bfloat16)
    x = parts["x"].detach()[:1, :1].to(torch.bfloat16)
    a, b = (parts[name].detach().to(torch.float32) for name in "ab")
    gates = parts["gates"].detach()[:1, :1].to(torch.bfloat16) if gated else None
    with torch.no_grad():
        y, _ = low_rank_product(base, x, a, b, gates=gates)
    wide = (x[0, 0].double() @ a.double().T).view(EXPERTS, RANK)
    wide = wide if gates is None else wide * gates[0, 0].double()[:, None]
    exact = b.double() @ wide.flatten()
    # The unit roundoff of 8 digits, once, and fp32's rounding of sums of a few terms.
    size = (b.double().abs() @ (a.double().abs() @ x[0, 0].double().abs())).max()
    assert ((y[0, 0].double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6 * size).all()
    assert not torch.equal(y[0, 0].double(), torch.zeros_like(exact))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_native", [True, False])
def test_many_tokens_meet_a_and_b_in_16_bits_only_where_these_are_native(
    dtype: torch.dtype, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "native_bfloat16", lambda kind: (is_native, "patched"))
    x = torch.zeros(2, TOKENS, IN, dtype=dtype)
    assert product.update_dtype(x) == dtype  # with gradients
    with torch.no_grad():
        kept = dtype == torch.bfloat16 and is_native
        assert product.update_dtype(x) == (torch.bfloat16 if kept else torch.float32)


@pytest.mark.parametrize("method", SERVED_AS_A_PAIR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_token_reads_b_in_the_same_order_for_every_method(method: str, dtype) -> None:
    """Their times are compared: none may have the better layout."""
    layer = layer_of(small(method), dtype=dtype).eval()
    perturb_layer(layer)
    with torch.no_grad(), layer.tracker.keeping():
        layer(torch.randn(1, 1, layer.base.in_features, dtype=dtype))
        assert_reads_b_by_columns(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_token_reads_b_in_that_order_in_mixlora_too(dtype: torch.dtype) -> None:
    block = mixed_ffn(small("mixlora")).to(dtype).eval()
    with torch.no_grad(), state_of(block).tracker.keeping():
        block(torch.randn(1, 1, 11, dtype=dtype))
        for layer in state_of(block).layers.values():
            assert_reads_b_by_columns(layer)


def assert_reads_b_by_columns(layer: AdapterLinear) -> None:
    """Check what was kept of a single token, which is fp32 beside 16 bits too."""
    kept = layer.tracker.kept or {}
    (made,) = (made for (name, *_), made in kept.items() if name == layer.name)
    assert made.b.t().is_contiguous()
    torch.testing.assert_close(made.b, layer.derive().b, rtol=0, atol=0)
