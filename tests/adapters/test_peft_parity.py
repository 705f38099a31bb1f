"""LoRA, rsLoRA, DoRA and PiSSA are peft's: outputs, gradients and merged weights in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterLinear, dora
from furina.model.state import state_of
from tests.helpers import Chain, layer_of, perturb, small

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
RANK, ALPHA = 3, 5.0
PEFT: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
every_method = pytest.mark.parametrize("method", PEFT)


def chain() -> Chain:
    torch.manual_seed(0)
    return Chain((24, 16, 12))


def theirs(method: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["first", "second"], **PEFT[method]
    )
    return get_peft_model(chain(), config).base_model.model


def ours(method: str, **options: Any) -> Chain:
    config = small(method, rank=RANK, alpha=ALPHA, **options)
    return furina.adapt(chain(), config, targets=["first", "second"], seed=0)


def pairs(mine: nn.Module, peer: nn.Module) -> list[tuple[AdapterLinear, Any]]:
    return [(layer, peer.get_submodule(name)) for name, layer in state_of(mine).layers.items()]


def parameters(layer: AdapterLinear, module: Any) -> dict[str, tuple[Tensor, Tensor]]:
    found = {
        "A": (layer.lora_A, module.lora_A["default"].weight),
        "B": (layer.lora_B, module.lora_B["default"].weight),
    }
    if hasattr(layer, "magnitude"):
        found["m"] = layer.magnitude, module.lora_magnitude_vector["default"].weight
    return found


@torch.no_grad()
def same(method: str, **options: Any) -> tuple[Chain, nn.Module]:
    """Return both models with our perturbed parameters."""
    mine, peer = ours(method, **options), theirs(method)
    for layer, module in pairs(mine, peer):
        if method == "pissa":  # the signs of singular vectors are anybody's choice
            start = (
                layer.lora_B @ layer.lora_A,
                module.lora_B["default"].weight @ (module.lora_A["default"].weight),
            )
            torch.testing.assert_close(*start, **CLOSE)
    perturb(mine)
    for layer, module in pairs(mine, peer):
        for own, other in parameters(layer, module).values():
            other.copy_(own)
    return mine, peer


CASES = [("lora", {}), ("rslora", {}), ("dora", {}), ("pissa", {}), ("pissa", {"in_place": True})]


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("mode", [True, False])
def test_outputs_and_gradients_are_pefts(method: str, options: dict[str, Any], mode: bool) -> None:
    mine, peer = same(method, **options)
    x = torch.randn(2, 5, 24)
    got, expected = mine.train(mode)(x), peer.train(mode)(x)
    torch.testing.assert_close(got, expected, **CLOSE)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    for layer, module in pairs(mine, peer):
        for name, (own, other) in parameters(layer, module).items():
            assert own.grad is not None and own.grad.abs().max() > 0
            torch.testing.assert_close(own.grad, other.grad, **CLOSE, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_merged_weights_are_pefts(method: str, options: dict[str, Any]) -> None:
    mine, peer = same(method, **options)
    furina.merge(mine)
    for layer, module in pairs(mine, peer):
        module.merge()
        torch.testing.assert_close(layer.base.weight, module.base_layer.weight, **CLOSE)


def test_the_scale_of_rslora_survives_a_file(tmp_path) -> None:
    mine = ours("rslora")
    perturb(mine)
    furina.save(mine, tmp_path / "a")
    config = state_of(furina.load(tmp_path / "a", chain())).config
    assert config.scale == pytest.approx(ALPHA / RANK**0.5)


# What is special about each


def test_doras_dropped_input_feeds_both_products(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(small("dora", dropout=0.5)).train()
    for parameter in (layer.lora_B, layer.magnitude):
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, mask = torch.randn(4, 11, dtype=torch.float64), torch.randint(0, 2, (4, 11)) * 2.0
    monkeypatch.setattr(dora, "dropout", lambda x, p: x * mask if p else x)
    turned = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    ratio = layer.magnitude / turned.norm(dim=1)
    dropped = x * mask
    expected = (
        layer.base(x)
        + (ratio - 1) * (dropped @ layer.base.weight.T)
        + ratio * layer.scale * (dropped @ layer.lora_A.T @ layer.lora_B.T)
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-11, atol=1e-12)


def test_doras_norm_has_no_gradient() -> None:
    layer = layer_of(small("dora"))
    layer.lora_B.data += 0.3 * torch.randn_like(layer.lora_B)
    x = torch.randn(4, 11, dtype=torch.float64)
    layer(x).sum().backward()
    turned = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    ratio = (layer.magnitude / turned.norm(dim=1)).detach()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    (ratio * (layer.scale * x @ a.T @ b.T)).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, a.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.lora_B.grad, b.grad, rtol=1e-10, atol=1e-12)


def test_a_row_of_zeros_stays_finite_in_dora() -> None:
    base = nn.Linear(5, 4).requires_grad_(False)
    base.weight[1] = 0.0
    model = nn.Sequential(base)
    furina.adapt(model, small("dora"), targets=["0"], seed=0)
    layer, x = state_of(model).layers["0"], torch.randn(3, 5)
    assert torch.equal(model(x), base(x))
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in furina.adapter_parameters(model).values())
    assert layer.delta().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pissas_factors_are_the_principal_part_of_w(dtype: torch.dtype) -> None:
    for options in ({}, {"svd_iterations": 16}):
        layer = layer_of(small("pissa", alpha=5.0, **options), 24, 16, dtype=dtype)
        weight = layer.base.weight.detach().double()
        u, sigma, vt = torch.linalg.svd(weight)
        principal = u[:, :3] * sigma[:3] @ vt[:3]
        start = layer.scale * (layer.lora_B @ layer.lora_A).detach().double()
        torch.testing.assert_close(start, principal, rtol=1e-4, atol=1e-5)
        assert layer.delta().abs().max() < 1e-15, "W is untouched and nothing is added yet"


def test_pissa_in_place_gives_w_back_whatever_happened(tmp_path) -> None:
    model = chain().to(torch.bfloat16)
    before = {name: p.clone() for name, p in model.named_parameters()}
    furina.adapt(model, small("pissa", in_place=True), targets=["first", "second"], seed=0)
    assert not torch.equal(model.first.base.weight, before["first.weight"])
    perturb(model)
    residual = model.first.base.weight.clone()
    x = torch.randn(3, 24).to(torch.bfloat16)
    expected = model(x)
    furina.save(model, tmp_path / "a")
    furina.merge(model)
    furina.unmerge(model)
    assert torch.equal(state_of(model).layers["first"].base.weight, residual)
    furina.merge(model)
    furina.remove(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    furina.load(tmp_path / "a", model)
    assert torch.equal(model.first.base.weight, residual)
    assert torch.equal(model(x), expected)


def test_a_failed_pissa_in_place_leaves_every_weight_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(furina.errors.ConfigurationError, match="narrow side of 1"):
        furina.adapt(model, small("pissa", in_place=True, rank=4), targets=["0", "1"])
    assert all(map(torch.equal, model.parameters(), before))


def test_the_b_of_lora_plus_learns_faster() -> None:
    model = furina.adapt(chain(), small("loraplus", ratio=7.0), targets=["first"], seed=0)
    rates = {n: g["lr"] for g in furina.parameter_groups(model, 1e-3) for n in g["names"]}
    assert rates == {"first.lora_A": 1e-3, "first.lora_B": pytest.approx(7e-3)}
