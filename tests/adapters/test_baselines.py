"""Every routed baseline is its paper's equations, loop by loop, forward and backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterLinear, methods
from furina.errors import ConfigurationError, NotMergeableError
from furina.model.state import state_of
from tests.adapters import loops
from tests.adapters.blocks import mixed_ffn
from tests.helpers import (
    BACKBONES,
    ROUTED,
    additivity_error,
    layer_of,
    perturb,
    perturb_layer,
    small,
    tokens,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ROUTERS = [name for name in methods() if "router_removed" in methods()[name].__dataclass_fields__]


def inputs(count: int = 9, width: int = 11, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def moved(method: str, **options: object) -> AdapterLinear:
    layer = layer_of(small(method, **options))
    perturb_layer(layer)
    return layer.train()


def experts(layer: nn.Module, count: int) -> list[loops.Expert]:
    """Cut the stacked A and B into the experts' own; one A serves all heads of HydraLoRA."""
    a, b = layer.lora_A, layer.lora_B
    rank = b.shape[1] // count
    rows = [slice(e * rank, (e + 1) * rank) for e in range(count)]
    shared = a.shape[0] == rank
    return [(a if shared else a[rows[e]], b[:, rows[e]]) for e in range(count)]


def gradients(y: Tensor, x: Tensor, layer: nn.Module) -> dict[str, Tensor]:
    """Return d(Σ w y)/d(x and every parameter), with fixed w."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad} | {"x": x}
    found = torch.autograd.grad((weight * y).sum(), list(trained.values()))
    return dict(zip(trained, found, strict=True))


def assert_same(layer: nn.Module, x: Tensor, expected: Tensor, actual: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **EXACT)
    ours, theirs = gradients(actual, x, layer), gradients(expected, x, layer)
    for name in theirs:
        assert theirs[name].abs().max() > 0, name
        torch.testing.assert_close(ours[name], theirs[name], **EXACT, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("method", ["molora", "hydralora", "loramoe"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "alpha": 5.0}, {"num_experts": 2}])
def test_dense_mixtures_weigh_every_expert(method: str, options: dict[str, object]) -> None:
    layer, x = moved(method, **options), inputs()
    config = layer.config
    expected = loops.mixture(
        x,
        layer.base.weight,
        layer.base.bias,
        experts(layer, config.num_experts),
        layer.router,
        config.scale,
        loops.all_experts,
    )
    assert_same(layer, x, expected, layer(x))


@pytest.mark.parametrize(("count", "top_k"), [(5, 1), (5, 2), (4, 3), (2, 2), (2, 5)])
def test_mola_adds_its_best_experts(count: int, top_k: int) -> None:
    layer, x = moved("mola", allocation=(count,), top_k=top_k), inputs()
    expected = loops.mixture(
        x,
        layer.base.weight,
        layer.base.bias,
        experts(layer, count),
        layer.router,
        layer.config.scale,
        loops.best_experts(top_k),
    )
    if top_k == 1:  # the only weight is 1 whatever the router says
        torch.testing.assert_close(layer(x), expected, **EXACT)
    else:
        assert_same(layer, x, expected, layer(x))


def test_slim_leaves_the_identities_share_to_the_backbone() -> None:
    layer, x = moved("slim", weight_yielding=False), inputs()
    expected = loops.mixture(
        x,
        layer.base.weight,
        layer.base.bias,
        experts(layer, 4),
        layer.router,
        layer.config.scale,
        loops.best_experts(2),
    )
    assert_same(layer, x, expected, layer(x))


def test_far_inputs_of_slim_yield_weight_to_the_identities() -> None:
    layer, x = moved("slim"), inputs().detach()
    near = layer(x) - layer.base(x)
    plain = moved("slim", weight_yielding=False)
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(near, plain(x) - plain.base(x), **EXACT)  # nothing seen so far
    nearest = [loops.largest(-(layer.centres - token).square().sum(1), 1)[0] for token in x]
    sums = torch.zeros(layer.config.num_clusters, 23, dtype=torch.float64)
    for cluster, token in zip(nearest, x, strict=True):
        sums[cluster] += torch.cat([torch.ones(1, dtype=x.dtype), token, token.square()])
    layer.after_step(sums)
    for cluster in set(nearest):
        members = x[[i for i, c in enumerate(nearest) if c == cluster]]
        torch.testing.assert_close(layer.mean[cluster], members.mean(0), **EXACT)
        spread = members.var(0, correction=0).sqrt().clamp(min=1e-3)
        torch.testing.assert_close(layer.deviation[cluster], spread, rtol=1e-6, atol=1e-9)
    far = 50 * x
    for token, got in zip(far, layer.yielded(far), strict=True):
        cluster = loops.largest(-(layer.centres - token).square().sum(1), 1)[0]
        excess = ((token - layer.mean[cluster]).abs() / layer.deviation[cluster]).max() - 4
        excess = excess.clamp(min=0) * layer.seen[cluster]
        torch.testing.assert_close(got, excess / (1 + excess), **EXACT)
    assert layer.yielded(far).max() > 0.8


@pytest.mark.parametrize("active", [1, 2, 4])
def test_flylora_adds_the_columns_that_a_selects(active: int) -> None:
    layer, x = moved("flylora", rank=5, active_rank=active), inputs()
    layer.selection_bias.copy_(torch.linspace(-0.2, 0.3, 5))
    expected = loops.flylora(
        x,
        layer.base.weight,
        layer.base.bias,
        layer.lora_A,
        layer.lora_B,
        layer.selection_bias,
        active,
        layer.config.scale,
    )
    assert_same(layer, x, expected, layer(x))


def test_flyloras_a_is_frozen_sparse_and_scaled() -> None:
    layer = layer_of(furina.methods()["flylora"](rank=64, active_rank=16), 400, 7)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_B"]
    assert ((layer.lora_A != 0).sum(1) == 400 * 16 // 64).all()
    entries = layer.lora_A[layer.lora_A != 0]
    assert entries.std().item() == pytest.approx(1 / 64, rel=4 / (2 * len(entries)) ** 0.5)
    signed = layer_of(small("flylora", selection="signed"))
    x = inputs()
    perturb_layer(signed)
    chosen = signed._selected(x, x @ signed.lora_A.T)
    for token, row in zip(x, chosen, strict=True):
        assert row.nonzero().flatten().tolist() == sorted(loops.largest(signed.lora_A @ token, 2))


@pytest.mark.parametrize(("count", "top_k"), [(4, 1), (4, 2), (3, 3)])
def test_mixlora_mixes_whole_ffns(count: int, top_k: int) -> None:
    model, x = mixed_ffn(small("mixlora", num_experts=count, top_k=top_k)), inputs()
    layers = state_of(model).layers
    expected = loops.mixed_ffn(
        x,
        {name: layer.base.weight for name, layer in layers.items()},
        {name: experts(layer, count) for name, layer in layers.items()},
        layers["gate_proj"].router,
        layers["gate_proj"].config.scale,
        top_k,
        nn.functional.silu,
    )
    if top_k == 1:
        torch.testing.assert_close(model(x), expected, **EXACT)
    else:
        assert_same(model, x, expected, model(x))


def test_mixlora_gives_two_tokens_different_updates_and_each_is_linear() -> None:
    """With the routing held fixed, f − f_base of the down linear is one matrix per routing."""
    model, x = mixed_ffn(small("mixlora", top_k=2)), inputs(40).detach()
    layers = state_of(model).layers
    gate, down = layers["gate_proj"], layers["down_proj"]
    routing = gate.route(x)
    selections = {tuple(s.argmax(-1).tolist()) for s in routing.selected.movedim(1, 0)}
    assert len(selections) > 1

    def update(token: int, a: Tensor) -> Tensor:
        fixed = [part[:, token : token + 1] for part in routing]
        whole = (part.expand(2, len(a), *part.shape[2:]) for part in fixed)
        down.block.begin(type(routing)(*whole))
        return down(a.expand(2, *a.shape)) - down.base(a)

    basis = torch.eye(7, dtype=torch.float64)
    one, other = update(0, basis), update(1, basis)
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    for token, matrix in ((0, one), (1, other)):
        together = update(token, a + b)
        torch.testing.assert_close(together, update(token, a) + update(token, b), **EXACT)
        torch.testing.assert_close(together, (a + b) @ matrix, **EXACT)
    assert (one - other).abs().max() > 1e-2 * one.abs().max()


def test_a_partly_adapted_ffn_is_refused_and_no_ffn_is_warned_about() -> None:
    model = BACKBONES["llama"]()
    with pytest.raises(ConfigurationError, match="mixes whole FFNs"):
        furina.adapt(model, small("mixlora"), targets=["up_proj", "q_proj"])
    assert not furina.is_adapted(model)
    with pytest.warns(UserWarning, match="plain LoRA here"):
        furina.adapt(model, small("mixlora"), targets=["q_proj"])


def test_a_linear_that_runs_before_the_gate_is_refused() -> None:
    model = mixed_ffn(small("mixlora"))
    with pytest.raises(ConfigurationError, match="ran before its block's gate_proj"):
        model.up_proj(inputs())
    model.gate_proj(inputs())
    with pytest.raises(ConfigurationError, match="of the form down"):
        model.down_proj(inputs(9, 7))


# One expert, all ranks, no router


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("molora", {"num_experts": 1}),
        ("hydralora", {"num_experts": 1}),
        ("loramoe", {"num_experts": 1}),
        ("mola", {"allocation": (1,)}),
        ("mixlora", {"num_experts": 1, "top_k": 1}),
        ("slim", {"num_experts": 1, "num_identity_experts": 0}),
        ("flylora", {"active_rank": 3}),
    ],
)
def test_what_does_not_choose_is_one_lora_and_merges(method, options) -> None:
    config = small(method, **options)
    assert config.mergeability().ok
    layer = layer_of(config, 11, 7)
    assert config.count(11, 7).router == 0 and not hasattr(layer, "router")
    assert perturb_layer(layer) is not None
    assert additivity_error(layer.eval()) < 1e-10
    x = inputs()
    with torch.no_grad():
        expected = layer.base(x) + config.scale * x @ (layer.lora_B @ layer.lora_A).T
        torch.testing.assert_close(layer(x), expected, **EXACT)


@pytest.mark.parametrize("method", ROUTED)
def test_a_routed_method_refuses_to_merge_and_to_export_with_the_reason(method, tmp_path) -> None:
    model = furina.adapt(BACKBONES["llama"](), small(method), seed=0)
    reason = state_of(model).config.mergeability().reason
    for call in (
        furina.merge,
        lambda m: furina.export_merged(m, tmp_path / "x"),
        lambda m: furina.export_peft(m, tmp_path / "x"),
    ):
        with pytest.raises(NotMergeableError, match=reason):
            call(model)
    assert not furina.is_merged(model) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "config",
    [*map(small, ROUTERS), small("loramoe", balance_coefficient=0.01, task_type=1)],
    ids=[*ROUTERS, "loramoe with its balance"],
)
def test_without_its_router_a_mixture_is_the_average_of_its_experts(config) -> None:
    model = furina.adapt(BACKBONES["llama"](torch.float64), config, seed=0).eval()
    perturb(model)
    before = {n: copy.deepcopy(layer) for n, layer in state_of(model).layers.items()}
    batch = tokens()
    routed = model(**batch).logits
    assert furina.without_router(model) is model
    assert not any("router" in name for name in furina.adapter_state_dict(model))
    for name, layer in state_of(model).layers.items():
        old = before[name]
        count = getattr(old, "num_experts", 1)
        shares = getattr(old, "router_rows", 1)
        scale = state_of(model).config.scale
        average = sum(b @ a for a, b in experts(old, count)) * scale / shares
        torch.testing.assert_close(layer.delta(), average.detach(), **EXACT)
    average = model(**batch).logits
    assert (average - routed).abs().max() > 1e-3
    furina.merge(model)
    torch.testing.assert_close(model(**batch).logits, average, rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigurationError, match=r"merged: call furina\.unmerge first"):
        furina.without_router(model)


def test_a_method_without_a_router_has_none_to_remove() -> None:
    model = furina.adapt(BACKBONES["llama"](), small("furina"))
    with pytest.raises(ConfigurationError, match="furina has no router that"):
        furina.without_router(model)


# MoLA's allocation


def test_mola_spreads_its_allocation_from_the_lowest_layer_up() -> None:
    config = furina.methods()["mola"]()
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(32)]
    resolved = config.resolve(names)
    found = [resolved.num_experts_of(name) for name in names]
    assert found == [2] * 8 + [4] * 8 + [6] * 8 + [8] * 8
    assert furina.configure("mola", resolved.to_dict()) == resolved
    with pytest.raises(ConfigurationError, match="divide the 30 layers"):
        config.resolve(names[:30])
    with pytest.raises(ConfigurationError, match="num_layers"):
        config.num_experts_of(names[0])


def test_the_layers_of_an_adapted_mola_have_their_own_experts() -> None:
    model = furina.adapt(BACKBONES["llama"](), small("mola", allocation=(2, 3)), seed=0)
    for name, layer in state_of(model).layers.items():
        assert layer.num_experts == (2 if ".0." in name else 3)
