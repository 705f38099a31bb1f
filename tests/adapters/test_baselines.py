"""Every routed baseline is its paper's equations, loop by loop, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterLinear, methods
from furina.errors import ConfigurationError, NotMergeableError
from furina.inject import state_of
from tests.adapters import loops
from tests.helpers import (
    BACKBONES,
    ROUTED,
    additivity_error,
    chain,
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
    chosen = signed._selected(x, x @ signed.lora_A.T, recording=False)
    for token, row in zip(x, chosen, strict=True):
        assert row.nonzero().flatten().tolist() == sorted(loops.largest(signed.lora_A @ token, 2))


class FFN(nn.Module):
    """A gated feed-forward block of unequal sides."""

    def __init__(self, act: Callable[[Tensor], Tensor], bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(11, 7, bias=bias), nn.Linear(11, 7, bias=bias)
        self.down_proj, self.act = nn.Linear(7, 11, bias=bias), act

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return found


def ffn(act: Callable[[Tensor], Tensor] = nn.functional.silu, **options: object) -> FFN:
    torch.manual_seed(0)
    model = furina.adapt(FFN(act).double(), small("mixlora", **options), seed=0)
    for layer in state_of(model).layers.values():
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for p in layer.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += 0.5 * noise
    return model


@pytest.mark.parametrize(("count", "top_k"), [(4, 1), (4, 2), (3, 3)])
def test_mixlora_mixes_whole_ffns(count: int, top_k: int) -> None:
    model, x = ffn(num_experts=count, top_k=top_k), inputs()
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
    model, x = ffn(top_k=2), inputs(40).detach()
    layers = state_of(model).layers
    gate, down = layers["gate_proj"], layers["down_proj"]
    routing = gate.route(x)
    selections = {tuple(s.argmax(-1).tolist()) for s in routing.selected.movedim(1, 0)}
    assert len(selections) > 1

    def update(token: int, a: Tensor) -> Tensor:
        fixed = [part[:, token : token + 1] for part in routing]
        down.block.routing = type(routing)(
            *(part.expand(2, len(a), *part.shape[2:]) for part in fixed)
        )
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
    model = ffn()
    with pytest.raises(ConfigurationError, match="ran before its block's gate_proj"):
        model.up_proj(inputs())
    model.gate_proj(inputs())
    with pytest.raises(ConfigurationError, match="of the form down"):
        model.down_proj(inputs(9, 7))


# The auxiliary losses


def routed_model(method: str, **options: object) -> nn.Module:
    model = furina.adapt(BACKBONES["llama"](torch.float64), small(method, **options), seed=0)
    perturb(model)
    return model.train()


def heard(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, list[list[Tensor]]]:
    """Run a forward; return each router's probabilities, per sequence and real token."""
    found: dict[str, list[list[Tensor]]] = {}
    mask = batch["attention_mask"]

    def keep(name: str, layer: nn.Module, x: Tensor) -> None:
        found[name] = [
            [loops.softmax(layer.router @ x[row, t]) for t in range(x.shape[1]) if mask[row, t]]
            for row in range(len(x))
        ]

    hooks = [
        layer.register_forward_pre_hook(lambda m, x, name=name: keep(name, m, x[0]))
        for name, layer in state_of(model).layers.items()
        if hasattr(layer, "router")
    ]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def test_mola_balances_the_selections_of_each_layer() -> None:
    model = routed_model("mola", allocation=(3, 5), top_k=2, balance_coefficient=0.3)
    assert state_of(model).config.num_layers == 2
    found = heard(model, tokens())
    assert len(found) == 14
    expected = 0.0
    for layer in (0, 1):
        pooled = [
            p
            for name, rows in found.items()
            if f"layers.{layer}." in name
            for row in rows
            for p in row
        ]
        assert len(pooled[0]) == (3, 5)[layer]
        expected = expected + loops.load_balance(pooled, k=2, slots=2)
    torch.testing.assert_close(furina.auxiliary_loss(model), 0.3 * expected, **EXACT)


def test_mixlora_balances_the_selections_of_all_layers_together() -> None:
    model = routed_model("mixlora", balance_coefficient=0.3)
    found = heard(model, tokens())
    assert len(found) == 2
    pooled = [p for rows in found.values() for row in rows for p in row]
    expected = 0.3 * loops.load_balance(pooled, k=2, slots=1)
    torch.testing.assert_close(furina.auxiliary_loss(model), expected, **EXACT)


@pytest.mark.parametrize("given", ["with the batch", "as an option"])
def test_loramoe_balances_its_halves_over_sequences(given: str) -> None:
    kind = 1 if given == "as an option" else None
    model = routed_model("loramoe", balance_coefficient=0.3, balance_delta=0.2, task_type=kind)
    batch, types = tokens(), [1, 1, 1]
    if given == "with the batch":
        types = [1, 0, 1]
        batch["task_types"] = torch.tensor(types)
    found = heard(model, batch)
    expected = sum(loops.localized_balance(rows, types, 0.2) for rows in found.values())
    torch.testing.assert_close(furina.auxiliary_loss(model), 0.3 * expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "at_balance"),
    [
        ("mola", {"allocation": (4,), "balance_coefficient": 1.0}, 2.0),  # 1 for each of 2 layers
        ("mixlora", {"balance_coefficient": 1.0}, 2.0),  # K
        ("loramoe", {"balance_coefficient": 1.0, "balance_delta": 0.0, "task_type": 0}, 0.0),
    ],
)
def test_a_balanced_router_has_the_documented_loss(method, options, at_balance) -> None:
    """With equal probabilities P_e = 1/N, so whatever the selections Σ f P is Σ f / N."""
    model = routed_model(method, **options)
    for layer in state_of(model).layers.values():
        if hasattr(layer, "router"):
            layer.router.data.zero_()
    ids = torch.randint(3, 40, (4, 8))
    model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert furina.auxiliary_loss(model).item() == pytest.approx(at_balance, abs=1e-9)


def test_loramoe_needs_types_sequences_and_two_halves() -> None:
    model = routed_model("loramoe", balance_coefficient=0.1)
    with pytest.raises(ConfigurationError, match="needs the type of every sequence"):
        model(**tokens())
    with pytest.raises(ConfigurationError, match="even, for two halves"):
        small("loramoe", balance_coefficient=0.1, num_experts=3)
    flat = chain(small("loramoe", balance_coefficient=0.1, task_type=0)).train()
    with pytest.raises(ConfigurationError, match=r"must be \(batch, sequence, features\)"):
        flat(inputs())


def test_the_types_of_a_batch_never_reach_the_backbone() -> None:
    model, batch = routed_model("loramoe"), tokens()
    expected = model(**batch).logits
    assert torch.equal(model(**batch, task_types=torch.tensor([0, 1, 0])).logits, expected)


# What moves without gradients


def step(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()
    furina.after_step(model)


def test_flyloras_bias_moves_once_a_step_towards_the_mean_load_of_real_tokens() -> None:
    model = routed_model("flylora", rank=5, bias_step=0.25)
    loads: dict[str, Tensor] = {}
    batch = tokens()
    for name, layer in state_of(model).layers.items():
        layer.register_forward_pre_hook(
            lambda m, x, name=name: loads.update(
                {name: m._selected(x[0], x[0] @ m.lora_A.T, False)[batch["attention_mask"] != 0]}
            )
        )
    step(model, batch)
    for name, layer in state_of(model).layers.items():
        load = loads[name].sum(0)
        assert torch.equal(layer.selection_bias, 0.25 * (load.mean() - load).sign()), name
    after = {n: layer.selection_bias.clone() for n, layer in state_of(model).layers.items()}
    furina.after_step(model)  # no forward since
    with torch.no_grad():
        model(**batch)
    model.eval()(**batch)
    furina.after_step(model)
    for name, layer in state_of(model).layers.items():
        assert torch.equal(layer.selection_bias, after[name])


@pytest.mark.parametrize("method", ["flylora", "slim"])
def test_micro_batches_add_up_and_recomputed_layers_count_once(method: str) -> None:
    states = []
    for way in ("whole", "halves", "checkpointed"):
        model, batch = routed_model(method), tokens(4)
        if way == "checkpointed":
            model.activation_checkpointing_enable({"use_reentrant": False})
        if way == "halves":
            for half in (slice(0, 2), slice(2, 4)):
                model(**{name: value[half] for name, value in batch.items()}).loss.backward()
            furina.after_step(model)
        else:
            step(model, batch)
        buffers = [
            {n: b for n, b in layer.named_buffers() if "base" not in n}
            for layer in state_of(model).layers.values()
        ]
        states.append(copy.deepcopy(buffers))
    for other in states[1:]:
        torch.testing.assert_close(other, states[0], rtol=1e-9, atol=1e-12)
    assert any((value != 0).any() for value in states[0][0].values())


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


@pytest.mark.parametrize("method", ROUTERS)
def test_without_its_router_a_mixture_is_the_average_of_its_experts(method, tmp_path) -> None:
    model = furina.adapt(BACKBONES["llama"](torch.float64), small(method), seed=0).eval()
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
