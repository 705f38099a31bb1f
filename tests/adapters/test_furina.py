"""The FURINA layer is the paper's equations, to the last digit that float64 allows."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

import furina
from furina import reference
from furina.adapters import config_class, configure
from furina.adapters.furina import FurinaConfig, FurinaLinear
from furina.adapters.furina_plain import PlainFurinaConfig
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker
from furina.model.state import state_of
from tests.adapters import test_contract
from tests.helpers import Chain, chain, layer_of, perturb, small, tiny_llama, tokens, variants

EXACT = 1e-10
RANK, EXPERTS = 3, 6


def furina_config(**options: object) -> FurinaConfig:
    config = small("furina", num_experts=EXPERTS, **options)
    assert isinstance(config, FurinaConfig)
    return config


def every_switch() -> Iterator[FurinaConfig]:
    """Yield every three named switches together, then the numbers one at a time."""
    for config in variants("furina", together=3):
        yield FurinaConfig(**{**config.to_dict(), "num_experts": EXPERTS})
    yield from (furina_config(num_shared_experts=s) for s in (0, 1, 2))
    yield from (furina_config(num_shared_experts=0, start=s) for s in ("zero_b", "subtract"))
    yield from (furina_config(top_k=k, activity=a) for k in (1, 4) for a in ("l2", "per_unit"))
    yield from (furina_config(eps=eps, activity=a) for eps in (1e-3, 0.3) for a in ("l2", "l1"))
    yield furina_config(alpha=0.7, scale_routed=True)
    yield furina_config(selection_coefficient=0.0, num_shared_experts=EXPERTS)


def both_forms(config: FurinaConfig) -> tuple[Chain, Chain]:
    """Return the fast and the plain form, which began alike, after the same moves."""
    fast, plain = chain(config), chain(PlainFurinaConfig(**config.to_dict()))
    assert_alike(fast, plain)
    perturb(fast)
    pairs = zip(parameters(fast).values(), parameters(plain).values(), strict=True)
    with torch.no_grad():
        for moved, parameter in pairs:
            parameter.copy_(moved)
    return fast.train(), plain.train()


def assert_alike(fast: nn.Module, plain: nn.Module) -> None:
    assert parameters(fast).keys() == parameters(plain).keys()
    for name, parameter in parameters(fast).items():
        assert torch.equal(parameter, parameters(plain)[name]), name


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return furina.adapter_parameters(model)


def inputs() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 4)
    mask[1, 2:] = 0
    mask[2, :1] = 0
    return x.requires_grad_(), mask


def assert_equal(found: Tensor | None, expected: Tensor, what: str) -> None:
    assert found is not None, what
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert error < EXACT, f"{what}: relative error {error:.1e}"


def gradients(loss: Tensor, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    named = {"x": x} | furina.adapter_parameters(model)
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    filled = zip(named.items(), found, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in filled}


@pytest.mark.parametrize("shared_experts", [0, 1])
def test_outputs_gradients_and_merged_weights_equal_the_reference_for_every_switch(
    shared_experts: int,
) -> None:
    for config in every_switch():
        if config.num_routed_experts:
            options = config.to_dict() | {"num_shared_experts": shared_experts}
            config = FurinaConfig(**options)
        fast, plain = both_forms(config)
        x, mask = inputs()
        found, expected = fast(x, mask), plain(x, mask)
        assert_equal(found, expected, f"output of {config}")
        weights = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
        found_gradients = gradients((found * weights).sum(), fast, x)
        for name, gradient in gradients((expected * weights).sum(), plain, x).items():
            assert gradient.any(), f"{name} has no gradient in the reference: {config}"
            assert_equal(found_gradients[name], gradient, f"gradient of {name} for {config}")
        for one, other in zip(layers_of(fast), layers_of(plain), strict=True):
            assert_equal(one.merged_weight(), other.merged_weight(), f"merged weight of {config}")


def test_the_selection_loss_and_its_gradients_equal_the_reference_for_every_switch() -> None:
    seen = 0
    for config in every_switch():
        if not config.has_auxiliary_loss:
            continue
        seen += 1
        fast, plain = both_forms(config)
        x, mask = inputs()
        fast(x, mask), plain(x, mask)
        found, expected = furina.auxiliary_loss(fast), furina.auxiliary_loss(plain)
        assert_equal(found, expected, f"loss of {config}")
        found_gradients = gradients(found, fast, x)
        for name, gradient in gradients(expected, plain, x).items():
            assert_equal(found_gradients[name], gradient, f"gradient of {name} for {config}")
        for one, other in zip(layers_of(fast), layers_of(plain), strict=True):
            tokens = torch.randn(4, one.base.in_features, dtype=torch.float64)
            assert_equal(one.activity(tokens), other.activity(tokens), f"shares of {config}")
    assert seen > 100


def layers_of(model: nn.Module) -> list[FurinaLinear]:
    return [each for each in state_of(model).layers.values() if isinstance(each, FurinaLinear)]


@pytest.mark.parametrize("start", ["zero_magnitude", "zero_b", "subtract"])
def test_both_forms_train_alike_dropout_and_checkpointing_included(start: str) -> None:
    losses = []
    for method in ("furina", "furina_plain"):
        config = configure(method, {"start": start, "rank": 3, "num_experts": 5, "dropout": 0.2})
        model = furina.adapt(tiny_llama(torch.float64), config, seed=0).train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.SGD(furina.parameter_groups(model, 0.05))
        torch.manual_seed(0)
        losses.append([])
        for step in range(4):
            loss = model(**tokens(seed=step)).loss + furina.auxiliary_loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)
    assert losses[0][0] != losses[0][-1]


def test_a_changed_equation_is_what_the_plain_form_trains_and_merges(monkeypatch) -> None:
    direction = reference.direction
    monkeypatch.setattr(reference, "direction", lambda *given: 2 * direction(*given))
    config = furina_config(num_shared_experts=0)
    layer = layer_of(PlainFurinaConfig(**config.to_dict())).train()
    same = layer_of(config).train()
    with torch.no_grad():
        layer.magnitude.fill_(1.0), same.magnitude.fill_(2.0)
    x = torch.randn(5, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), same(x), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(layer.delta(), same.delta(), rtol=EXACT, atol=EXACT)


def test_the_plain_form_is_known_by_name_and_not_listed() -> None:
    assert "furina_plain" not in furina.methods()
    plain, fast = (fields(config_class(name)) for name in ("furina_plain", "furina"))
    assert [(each.name, each.default) for each in plain] == [
        (each.name, each.default) for each in fast
    ]
    model = furina.adapt(tiny_llama(), "furina_plain", rank=2, num_experts=4)
    assert state_of(model).config == PlainFurinaConfig(rank=2, num_experts=4)


def test_the_plain_form_keeps_every_methods_contract(monkeypatch) -> None:
    monkeypatch.setattr(PlainFurinaConfig, "listed", True)
    tests = [test for name, test in vars(test_contract).items() if name.startswith("test_")]
    kept = [test for test in tests if [*inspect.signature(test).parameters] == ["method"]]
    assert len(kept) > 10
    for test in kept:
        test("furina_plain")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "dead", ["a row of B", "an expert's B", "all of B", "a row of A", "all of A"]
)
def test_zero_weights_give_finite_values_and_gradients(dead: str, dtype: torch.dtype) -> None:
    for activity in ("l2", "l1", "per_unit"):
        model = chain(furina_config(activity=activity), dtype=dtype)
        perturb(model)
        layer = state_of(model).layers["first"]
        with torch.no_grad():
            {
                "a row of B": layer.lora_B[2],
                "an expert's B": layer.lora_B[:, 2 * RANK : 3 * RANK],
                "all of B": layer.lora_B,
                "a row of A": layer.lora_A[4],
                "all of A": layer.lora_A,
            }[dead].zero_()
        x, mask = inputs()
        model.train()
        y = model(x.to(dtype), mask)
        loss = y.square().sum() + furina.auxiliary_loss(model)
        loss.backward()
        assert y.isfinite().all()
        assert loss.isfinite()
        for name, parameter in furina.adapter_parameters(model).items():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), (name, activity)
        assert layer.delta().isfinite().all()


def test_a_zero_row_of_an_expert_gives_a_zero_direction() -> None:
    layer = layer_of(furina_config())
    with torch.no_grad():
        layer.lora_B[3] = 0
        layer.magnitude.fill_(2.0)
    assert not layer.delta()[3].any()
    assert layer.delta()[2].any()


def test_an_experts_voice_is_the_cosine_between_the_input_and_its_rows() -> None:
    layer = layer_of(furina_config(num_shared_experts=0))
    with torch.no_grad():
        layer.magnitude.fill_(1.0)
    x = torch.randn(5, 11, dtype=torch.float64)
    a = layer.lora_A.detach().view(EXPERTS, RANK, -1)
    b = layer.lora_B.detach().view(-1, EXPERTS, RANK).transpose(0, 1)
    rows = torch.stack([b[e] @ a[e] for e in range(EXPERTS)])
    cosine = nn.functional.cosine_similarity(x[:, None, None], rows[None], dim=-1)
    expected = layer.base(x) + (x.norm(dim=1)[:, None, None] * cosine).sum(1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def test_no_product_of_the_sides_is_formed_in_training() -> None:
    """A k×d tensor per expert would show as a saved tensor of at least k·d elements."""
    sides, saved = (64, 96), []
    layer = layer_of(furina_config(), *sides, dtype=torch.float32).train()
    with torch.no_grad():
        layer.magnitude.fill_(1.0)

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != layer.base.weight.data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(2, sides[0], requires_grad=True))
    assert saved
    assert max(saved) < sides[0] * sides[1]


@pytest.mark.parametrize("start", ["zero_magnitude", "zero_b", "subtract"])
@pytest.mark.parametrize("sides", [(77, 131), (576, 1536), (192, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_start_is_the_base_layer_bit_for_bit(start: str, sides, dtype: torch.dtype) -> None:
    layer = layer_of(FurinaConfig(start=start, dropout=0.3), *sides, dtype=dtype)
    for length in (1, 5, 33):
        x = torch.randn(length, sides[0]).to(dtype)
        for mode in (True, False):
            layer.train(mode)
            assert torch.equal(layer(x), layer.base(x))
            with torch.no_grad():
                assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("start", ["zero_magnitude", "zero_b"])
def test_the_selection_loss_does_not_move_an_adapter_that_is_still_silent(start: str) -> None:
    model = chain(furina_config(start=start)).train()
    x, mask = inputs()
    model(x, mask)
    loss = furina.auxiliary_loss(model)
    assert loss > 0
    loss.backward()
    for name, parameter in furina.adapter_parameters(model).items():
        assert parameter.grad is None or not parameter.grad.any(), name


def test_the_selection_loss_pulls_on_the_experts_as_soon_as_v_has_moved() -> None:
    model = chain(furina_config()).train()
    with torch.no_grad():
        for layer in state_of(model).layers.values():
            layer.magnitude[0] = 1e-3
    x, mask = inputs()
    model(x, mask)
    furina.auxiliary_loss(model).backward()
    layer = state_of(model).layers["first"]
    shared = layer.shared_rank
    assert layer.lora_A.grad[shared:].any() and layer.lora_Bt.grad[shared:].any()


def test_the_subtracted_start_has_the_magnitude_of_the_weight() -> None:
    layer = layer_of(furina_config(start="subtract"))
    expected = layer.base.weight.norm(dim=1) / (EXPERTS - 1)
    torch.testing.assert_close(layer.magnitude.detach(), expected)
    b, a = layer.factors()
    assert b.shape == (7, (2 * EXPERTS - 1) * RANK)
    assert a.shape == ((2 * EXPERTS - 1) * RANK, 11)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_shared_experts": 9}, "num_shared_experts=9 must be between 0 and num_experts=8"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 7}, "top_k=7 must be smaller than the 7 self-routed experts"),
        ({"top_k": 8}, "top_k=8 must be smaller than the 7 self-routed experts"),
        ({"num_shared_experts": 8}, "smaller than the 0 self-routed experts"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1e-30}, "eps=1e-30"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": math.inf}, "alpha=inf must be finite"),
        ({"selection_coefficient": -0.1}, "selection_coefficient=-0.1"),
        ({"selection_coefficient": math.nan}, "selection_coefficient=nan must be finite"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"magnitude_lr_multiplier": 0.0}, "magnitude_lr_multiplier=0.0"),
        ({"activity": "l3"}, "activity='l3' must be one of"),
        ({"start": "zero"}, "start='zero' must be one of"),
        ({"magnitude": "own"}, "magnitude='own' must be one of"),
        ({"selection_reduction": "max"}, "selection_reduction='max' must be one of"),
    ],
)
def test_a_bad_option_is_refused_in_one_sentence_naming_it(options: dict, words: str) -> None:
    with pytest.raises(ConfigurationError, match="furina: ") as caught:
        FurinaConfig(**options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_chosen_experts_than_there_are_is_fine_while_the_loss_is_off() -> None:
    config = furina_config(top_k=9, selection_coefficient=0.0)
    layer = FurinaLinear(nn.Linear(4, 3), "linear", ForwardTracker(), config)
    assert torch.isfinite(layer.train()(torch.randn(2, 4))).all()


def test_without_routed_experts_it_is_lora() -> None:
    lora = layer_of(small("lora", rank=6))
    config = FurinaConfig(
        rank=6, num_experts=1, num_shared_experts=1, selection_coefficient=0.0, dropout=0.0
    )
    plain = layer_of(config)
    with torch.no_grad():
        for name in ("lora_A", "lora_B"):
            value = torch.randn_like(getattr(lora, name))
            getattr(lora, name).copy_(value)
            getattr(plain, name).copy_(value)
    x = torch.randn(4, 11, dtype=torch.float64)
    torch.testing.assert_close(plain(x), lora(x), rtol=1e-14, atol=1e-14)
    assert not hasattr(plain, "magnitude")


def test_one_magnitude_for_all_equals_the_same_magnitude_for_each() -> None:
    together, apart = layer_of(furina_config()), layer_of(furina_config(magnitude="per_expert"))
    v = torch.rand(7, dtype=torch.float64)
    with torch.no_grad():
        together.magnitude.copy_(v)
        apart.magnitude.copy_(v.expand_as(apart.magnitude))
    torch.testing.assert_close(together.delta(), apart.delta(), rtol=1e-14, atol=1e-14)


def test_the_layers_norms_are_those_of_the_reference_in_float64() -> None:
    layer = layer_of(furina_config())
    found = layer.derive().extra[0][1:].t()
    a = layer.lora_A.detach().view(EXPERTS, RANK, -1)
    b = layer.lora_B.detach().view(7, EXPERTS, RANK)
    exact = torch.stack([(b[:, e] @ a[e]).norm(dim=1) for e in range(1, EXPERTS)], dim=1)
    torch.testing.assert_close(found.detach(), exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("activity", ["l2", "l1", "per_unit"])
@pytest.mark.parametrize("start", ["zero_magnitude", "subtract"])
def test_an_expert_next_to_nothing_stays_in_the_range_of_fp16(activity: str, start: str) -> None:
    """B̃ = diag(v/d̃) B is then beyond 65504, and infinity times 0 is no number."""
    found = []
    for dtype in (torch.float16, torch.float32):
        options = {"num_experts": EXPERTS, "activity": activity, "start": start}
        model = furina.adapt(tiny_llama(dtype), small("furina", **options), seed=0)
        perturb(model)
        for layer in state_of(model).layers.values():
            with torch.no_grad():
                experts = layer.lora_A.view(EXPERTS, -1, layer.lora_A.shape[1])
                experts[2], experts[3] = 0, 1e-6 * experts[3]
                layer.magnitude.mul_(20)
                assert layer._directions().b.abs().max() > 65504
        logits = model.train()(**tokens()).logits
        loss = furina.auxiliary_loss(model)
        (logits.float().square().mean() + loss).backward()
        assert all(p.grad.isfinite().all() for p in furina.adapter_parameters(model).values())
        with torch.no_grad():
            model.eval()
            found.append((logits.float(), model(**tokens()).logits.float(), loss))
    for half, single in zip(*found, strict=True):
        spread = single.abs().max().item()
        torch.testing.assert_close(half, single, rtol=0, atol=spread * 2**-6)
