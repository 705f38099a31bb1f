"""What every registered method keeps, by name of nothing but the registry."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch
from torch import Tensor

import furina
from furina.adapters import AdapterLinear, configure, methods
from furina.errors import ConfigurationError, NotMergeableError
from furina.model.state import state_of
from tests.helpers import (
    BACKBONES,
    additivity_error,
    chain,
    layer_of,
    perturb,
    perturb_layer,
    raw,
    small,
    task_loss,
    tokens,
    ulp_distance,
    variants,
)

every_method = pytest.mark.parametrize("method", methods())
every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
SIDES = ((11, 7), (5, 13))
FFN = ("gate_proj", "up_proj", "down_proj")


def slices_without(values: dict[str, Tensor]) -> list[str]:
    """Return the rows and columns of each matrix, and entries of each vector, that are all 0."""
    found = []
    for name, value in values.items():
        for dim in range(value.dim()):
            others = [other for other in range(value.dim()) if other != dim]
            alive = (value != 0).sum(others) if others else value != 0
            found += [f"{name} {dim}:{i}" for i in (alive == 0).nonzero().flatten().tolist()]
    return found


def numel(layer: AdapterLinear) -> int:
    own = (p for name, p in layer.named_parameters() if not name.startswith("base."))
    return sum(p.numel() for p in own if p.requires_grad)


@every_method
def test_the_parameter_count_is_the_closed_form_for_every_switch(method: str) -> None:
    for config in variants(method):
        for sides in SIDES:
            assert config.count(*sides).trainable == numel(layer_of(config, *sides)), config


@every_method
def test_the_printed_formula_gives_the_default_count(method: str) -> None:
    config = small(method)
    options = config.to_dict()
    d, k = 11, 7
    formula = config.parameter_formula.split(";")[0]
    formula = formula.replace("·", "*").replace("r(", "r*(").replace(")d", ")*d")
    experts = options.get("num_experts", options.get("allocation", [None])[0])
    names = {"d": d, "k": k, "r": options.get("rank"), "N": experts}
    assert eval(formula, {"__builtins__": {}}, names) == config.count(d, k).trainable


@every_method
def test_a_method_says_what_it_is(method: str) -> None:
    config = methods()[method]
    assert config.name == method
    assert config.summary and config.source and config.parameter_formula
    for config in variants(method):
        assert config.mergeability().reason.strip()


@every_method
def test_a_config_survives_json(method: str) -> None:
    for config in (methods()[method](), small(method)):
        assert configure(method, json.loads(json.dumps(config.to_dict()))) == config


@every_method
def test_an_unknown_option_names_the_nearest_right_one(method: str) -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'dropout'") as caught:
        configure(method, {"droput": 0.1})
    assert all(field.name in str(caught.value) for field in fields(methods()[method]))


@every_method
@pytest.mark.parametrize("value", ["much", None, [0.1]])
def test_an_option_of_the_wrong_type_is_refused_in_one_sentence(method: str, value) -> None:
    with pytest.raises(ConfigurationError, match="dropout") as caught:
        configure(method, {"dropout": value})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["furna", "LORA", "", "no such thing"])
def test_an_unknown_method_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigurationError, match="Unknown method") as caught:
        configure(name, {})
    assert all(method in str(caught.value) for method in methods())


@every_method
def test_every_start_is_the_base_layer_for_every_switch(method: str) -> None:
    for config in variants(method):
        for dtype in (torch.float32, torch.bfloat16):
            layer = layer_of(config, dtype=dtype)
            x = torch.randn(4, 11).to(dtype)
            for mode in (True, False):
                assert torch.equal(layer.train(mode)(x), layer.base(x)) or not config.exact_start


@every_method
@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_adapted_model_starts_as_the_base_model(method, backbone, dtype) -> None:
    model, batch = BACKBONES[backbone](dtype), tokens()
    with torch.no_grad():
        expected = model(**batch).logits
        furina.adapt(model, small(method, dropout=0.2), seed=0)
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.train()(**batch).logits, expected)


@every_method
def test_every_slice_and_entry_gets_a_gradient_from_the_task_alone_for_every_switch(method) -> None:
    for config in variants(method):
        layer = layer_of(config)
        perturb_layer(layer)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 11, generator=generator, dtype=torch.float64)
        layer.train()(x).square().sum().backward()
        found = {n: p.grad for n, p in layer.named_parameters() if not n.startswith("base.")}
        assert slices_without(found) == [], config


@every_method
@every_backbone
def test_in_a_model_every_slice_and_entry_gets_a_gradient_from_the_task_alone(
    method: str, backbone: str
) -> None:
    model = furina.adapt(BACKBONES[backbone](), small(method), seed=0).train()
    perturb(model)
    task_loss(model, tokens(8, 17)).backward()  # enough tokens for every expert
    found = {name: p.grad for name, p in furina.adapter_parameters(model).items()}
    assert slices_without(found) == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@every_method
@pytest.mark.parametrize("with_loss", [True, False])
def test_every_slice_and_entry_has_moved_after_three_steps_from_the_start(
    method, with_loss
) -> None:
    model = furina.adapt(BACKBONES["qwen2"](), small(method), seed=0).train()
    before = {name: p.detach().clone() for name, p in furina.adapter_parameters(model).items()}
    optimiser = torch.optim.AdamW(furina.parameter_groups(model, 1e-3))
    losses = []
    for step in range(3):
        loss = task_loss(model, tokens(8, 17, seed=step))
        losses.append(loss.item())
        if with_loss:
            loss = loss + furina.auxiliary_loss(model)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = furina.adapter_parameters(model)
    assert slices_without({name: after[name].detach() - old for name, old in before.items()}) == []


@every_method
def test_training_reduces_the_loss(method: str) -> None:
    model = furina.adapt(BACKBONES["llama"](), small(method), seed=0).train()
    optimiser = torch.optim.AdamW(furina.parameter_groups(model, 1e-2))
    losses = []
    for _ in range(12):
        loss = task_loss(model, tokens())
        (loss + furina.auxiliary_loss(model)).backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@every_method
def test_a_method_is_additive_in_its_input_exactly_when_it_says_that_it_merges(method) -> None:
    for config in variants(method):
        if config.scope == "block":
            continue  # shown for the block in the method's own tests
        layer = layer_of(config).eval()
        perturb_layer(layer)
        additive = additivity_error(layer) < 1e-10
        assert additive == config.mergeability().ok, config


@every_method
def test_merged_equals_unmerged_to_1e_12_per_linear_for_every_switch(method: str) -> None:
    for config in variants(method):
        layer = layer_of(config).eval()
        ratio = perturb_layer(layer)
        if not config.mergeability().ok:
            continue
        assert ratio is not None and 0.1 <= ratio <= 0.3
        x = torch.randn(20, 11, dtype=torch.float64)
        with torch.no_grad():
            unmerged, plain = layer(x), layer.base(x)
            layer.merge()
            error = (layer.base(x) - unmerged).abs().max() / unmerged.abs().max()
        assert error < 1e-12, (config, error)
        assert (plain - unmerged).abs().max() > 1e-2 * unmerged.abs().max()


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_stored_weight_is_the_float64_one_rounded_once(method: str, dtype) -> None:
    for config in variants(method):
        layer = layer_of(config, 64, 48, dtype=dtype)
        if perturb_layer(layer) is None:
            continue
        exact = layer.pristine_weight.to(torch.float64) + layer.delta()
        layer.merge()
        distance = ulp_distance(layer.base.weight.detach(), exact).max()
        assert distance <= 0.5 + 1e-3, (config, distance)


@every_method
def test_delta_and_factors_leave_the_layer_alone_and_are_float64(method: str) -> None:
    layer = layer_of(small(method), dtype=torch.bfloat16)
    if perturb_layer(layer) is None:
        with pytest.raises(NotMergeableError):
            layer.delta()
        return
    before = {name: raw(tensor) for name, tensor in layer.state_dict().items()}
    assert layer.delta().dtype == torch.float64
    factors = layer.factors()
    if factors is not None:
        b, a = factors
        assert b.dtype == a.dtype == torch.float64
        torch.testing.assert_close(b @ a, layer.delta(), rtol=1e-12, atol=1e-14)
    assert {name: raw(tensor) for name, tensor in layer.state_dict().items()} == before


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_parameters_are_at_least_fp32_and_follow_float64(method: str, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for config in variants(method):
        layer = layer_of(config, dtype=dtype)
        assert {tensor.dtype for tensor in layer.adapter_tensors().values()} == {wide}, config
        y = layer.train()(torch.randn(3, 11).to(dtype))
        assert y.dtype == dtype
        y.float().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        assert {gradient.dtype for gradient in gradients if gradient is not None} <= {wide}


@every_method
@pytest.mark.parametrize("cast", ["bfloat16", "half", "float", "double"])
def test_casting_an_adapted_model_keeps_the_adapter_at_least_fp32(method: str, cast: str) -> None:
    model = chain(small(method), dtype=torch.float32)
    perturb(model)
    before = furina.adapter_state_dict(model)
    before = {name: tensor.double() for name, tensor in before.items()}
    getattr(model, cast)()
    wide = torch.float64 if cast == "double" else torch.float32
    for name, tensor in furina.adapter_state_dict(model).items():
        assert tensor.dtype == wide
        assert torch.equal(tensor.double(), before[name]), "no digit may be lost on the way"
    assert state_of(model).layers["first"].base.weight.dtype == getattr(
        torch, {"half": "float16", "float": "float32", "double": "float64"}.get(cast, cast)
    )


@every_method
def test_dropout_acts_in_training_only_and_follows_the_seed(method: str) -> None:
    layer = layer_of(small(method, dropout=0.5))
    perturb_layer(layer)
    x = torch.randn(6, 11, dtype=torch.float64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    torch.manual_seed(1)
    first = layer(x)
    assert not torch.equal(first, layer(x))
    torch.manual_seed(1)
    assert torch.equal(first, layer(x))


@every_method
def test_the_bias_is_added_once_and_never_touched(method: str) -> None:
    with_bias, without = layer_of(small(method)), layer_of(small(method), bias=False)
    assert without.base.bias is None
    perturb_layer(with_bias)
    bias = with_bias.base.bias.clone()
    origin = with_bias.eval()(torch.zeros(1, 11, dtype=torch.float64))
    assert torch.equal(origin[0], bias)
    if small(method).mergeability().ok:
        with_bias.merge()
    assert torch.equal(with_bias.base.bias, bias)


@every_method
def test_groups_hold_every_parameter_once_with_its_own_rate(method: str) -> None:
    model = chain(small(method))
    groups = furina.parameter_groups(model, 1e-3, weight_decay=0.1, lora_plus_ratio=5.0)
    grouped = [parameter for group in groups for parameter in group["params"]]
    trained = furina.adapter_parameters(model)
    assert sorted(map(id, grouped)) == sorted(map(id, trained.values()))
    multipliers = state_of(model).config.learning_rate_multipliers()
    for group in groups:
        assert len(group["names"]) == len(group["params"])
        for name, parameter in zip(group["names"], group["params"], strict=True):
            assert trained[name] is parameter
            leaf = name.rpartition(".")[2]
            factor = multipliers.get(leaf, 1.0) * (5.0 if leaf.startswith("lora_B") else 1.0)
            assert group["lr"] == pytest.approx(1e-3 * factor)
            assert group["weight_decay"] == (0.1 if leaf.startswith("lora_") else 0.0)
    torch.optim.AdamW(groups)


@every_method
@every_backbone
def test_the_summary_counts_what_is_there(method: str, backbone: str) -> None:
    model = BACKBONES[backbone]()
    plain = sum(p.numel() for p in model.parameters())
    furina.adapt(model, small(method))
    layers = state_of(model).layers
    summary = furina.describe(model)
    assert summary.method == method
    assert summary.num_linears == len(layers) == 14
    assert summary.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.trainable == sum(map(numel, layers.values()))
    assert summary.total == plain + summary.trainable
    counts = [
        state_of(model).config.count(layer.base.in_features, layer.base.out_features, name)
        for name, layer in layers.items()
    ]
    assert summary.trainable == sum(count.trainable for count in counts)
    assert summary.trainable - summary.trainable_without_router == sum(c.router for c in counts)


@pytest.mark.parametrize(
    ("method", "options", "millions"),
    [
        ("lora", {"rank": 80, "alpha": 160}, 199.9),  # 2.97 % of 6.74 B
        ("rslora", {"rank": 80}, 199.9),
        ("dora", {"rank": 80, "alpha": 160}, 201.2),
        ("furina", {"rank": 10}, 201.2),  # the same rank in all, and as many vectors as DoRA has
        ("mixlora", {"rank": 16}, 203.4),
        ("loramoe", {"rank": 24, "num_experts": 6, "targets": FFN}, 212.5),
        ("mola", {"rank": 10, "allocation": (8,)}, 209.0),
        ("hydralora", {"rank": 4, "num_experts": 4, "targets": FFN}, 18.3),
    ],
)
def test_llama_2_7b_has_the_published_number_of_parameters(method, options, millions) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=11008))
        backbone = sum(p.numel() for p in model.parameters())
        furina.adapt(model, method, **options)
    summary = furina.describe(model)
    assert round(summary.trainable / 1e6, 1) == millions
    without_router = {"mixlora": 202.4, "hydralora": 15.8}
    if method in without_router:
        assert round(summary.trainable_without_router / 1e6, 1) == without_router[method]
    assert round(backbone / 1e9, 2) == 6.74
    if method == "lora":
        assert round(100 * summary.trainable / backbone, 2) == 2.97


@every_method
def test_a_layer_handles_any_number_of_leading_dimensions(method: str) -> None:
    layer = layer_of(small(method)).eval()
    perturb_layer(layer)
    x = torch.randn(2, 3, 4, 11, dtype=torch.float64)
    flat = layer(x.reshape(-1, 11)).view(2, 3, 4, 7)
    torch.testing.assert_close(layer(x), flat, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(layer(x[0, 0, 0]), flat[0, 0, 0], rtol=1e-13, atol=1e-13)
    assert layer(x[:0]).shape == (0, 3, 4, 7)


@every_method
@pytest.mark.parametrize("tokens", [1, 5])
def test_held_gradients_do_not_change_an_answer(method: str, tokens: int) -> None:
    """While a parameter has a gradient nothing is kept; the factors have the same dtype anyhow."""
    for config in variants(method):
        layer = layer_of(config, dtype=torch.bfloat16).eval()
        perturb_layer(layer)
        x = torch.randn(1, tokens, 11).to(torch.bfloat16)
        with torch.no_grad():
            kept = layer(x)
            for parameter in layer.parameters():
                parameter.grad = torch.zeros_like(parameter)
            assert torch.equal(layer(x), kept), config


def test_flylora_on_llama_3_1_8b_has_the_published_number_of_parameters() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sides = {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
    with torch.device("meta"):
        model = furina.adapt(LlamaForCausalLM(LlamaConfig(**sides)), "flylora")
    summary = furina.describe(model)
    assert round(summary.trainable / 1e6, 1) == 44.0
    assert round(summary.active / 1e6, 1) == 11.0


@every_method
def test_the_parameters_that_act_on_a_token_are_counted(method: str) -> None:
    for config in variants(method):
        count = config.count(11, 7)
        assert 0 < count.active <= count.trainable
        if config.mergeability().ok:
            assert count.active == count.trainable, "a fixed update uses all it has"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("rank", value) for value in (4.0, "4", True, None, torch.tensor(4).numpy()[()])),
        *(("alpha", value) for value in ("16", True, torch.tensor(1.5).numpy()[()])),
        *(("use_rslora", value) for value in ("no", 0)),
    ],
)
def test_a_value_of_another_type_is_refused_before_it_is_trained(
    option: str, value: object
) -> None:
    """A config that is made directly is written as JSON at the end, hours later."""
    with pytest.raises(ConfigurationError, match=f"{option}="):
        methods()["lora"](**{option: value})


def test_a_whole_number_will_do_for_a_real_one() -> None:
    assert methods()["lora"](rank=4, alpha=8).scale == 2
