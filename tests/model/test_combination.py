"""A combined adapter is the weighted sum of the updates, and as plain a LoRA as any other."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import furina
from furina import cli
from furina.adapters import AdapterConfig
from furina.errors import ConfigurationError, FurinaError, NotMergeableError
from furina.model.adapter_sets import AdapterSet
from furina.model.combination import coefficients, frobenius_norm
from furina.model.config_file import CONFIG_FILE
from furina.model.state import state_of
from tests.helpers import (
    BACKBONES,
    MERGEABLE,
    ROUTED,
    fingerprint,
    layer_of,
    perturb,
    perturb_layer,
    raw,
    small,
    tokens,
)

WEIGHTS = {"one": 0.7, "other": -0.4}
POSITIVE = {"one": 0.7, "other": 0.4}
LOW_RANK = [method for method in MERGEABLE if layer_of(small(method)).factors() is not None]
CONFIGS: dict[str, AdapterConfig] = {
    **{method: small(method) for method in LOW_RANK},
    "furina_subtract": small("furina", start="subtract"),
    "lora_wide": small("lora", rank=5, use_rslora=True),
    "pissa_in_place": small("pissa", in_place=True),
    "mixlora_without_router": small("mixlora", router_removed=True),
}
PAIRS = list(itertools.pairwise([*CONFIGS, next(iter(CONFIGS))]))
every_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)
Deltas = dict[str, dict[str, Tensor]]


def fresh(dtype: torch.dtype = torch.float32) -> nn.Module:
    return BACKBONES["llama"](dtype)


def made(
    *configs: tuple[str, AdapterConfig, list[str] | None], dtype: torch.dtype = torch.float32
) -> tuple[AdapterSet, Deltas]:
    """Return a set of perturbed adapters and their updates in float64, linear by linear."""
    adapters, deltas = AdapterSet(fresh(dtype)), {}
    for seed, (name, config, targets) in enumerate(configs):
        adapters.add(name, config, targets=targets, seed=seed)
        adapters.use(name)
        perturb(adapters.model, target=0.1 + 0.2 * seed, seed=100 * seed)
        if config.mergeability().ok:
            deltas[name] = deltas_of(adapters.model)
    adapters.use(None)
    return adapters, deltas


def deltas_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.delta().detach() for name, layer in state_of(model).layers.items()}


def pair_of(pair: tuple[str, str]) -> tuple[AdapterSet, Deltas]:
    return made(*zip(("one", "other"), (CONFIGS[name] for name in pair), (None, None), strict=True))


def magnitudes(adapters: AdapterSet, weights: dict[str, float]) -> dict[str, Tensor]:
    """Return Σ |λ_i| |B_i| |A_i|, what rounding errors of the factors are relative to."""
    total: dict[str, Tensor] = {}
    for name, weight in weights.items():
        adapters.use(name)
        for linear, layer in state_of(adapters.model).layers.items():
            b, a = layer.factors()
            total[linear] = total.get(linear, 0) + abs(weight) * b.detach().abs() @ a.detach().abs()
    adapters.use(None)
    return total


def reference_from(
    deltas: Deltas, weights: dict[str, float], power: float
) -> dict[str, dict[str, float]]:
    """Return λ_i of each linear, from norms of whole k×d updates."""
    found = {}
    for linear in {linear for updates in deltas.values() for linear in updates}:
        norms = {
            name: updates[linear].square().sum().sqrt().item() if linear in updates else 0.0
            for name, updates in deltas.items()
        }
        mean = sum(weights[name] * norms[name] ** power for name in weights)
        total = sum(weights.values())
        found[linear] = {
            name: total * weights[name] * norms[name] ** power / mean for name in weights
        }
    return found


@every_pair
def test_linear_is_the_weighted_sum_to_two_roundings_of_the_factors(pair) -> None:
    """fl(b) fl(a) = b a (1 + δ)(1 + δ'), |δ| ≤ u = 2⁻²⁴: |error| ≤ (2u + u²) Σ |λ| |B| |A|."""
    adapters, deltas = pair_of(pair)
    adapters.combine("both", WEIGHTS)
    bound, u = magnitudes(adapters, WEIGHTS), 2.0**-24
    adapters.use("both")
    for linear, delta in deltas_of(adapters.model).items():
        exact = sum(weight * deltas[name][linear] for name, weight in WEIGHTS.items())
        error = (delta - exact).abs()
        assert (error <= (2 * u + u * u) * bound[linear] + 1e-14).all(), linear
        for name, weight in WEIGHTS.items():  # leaving one out breaks the bound
            without = (delta - exact + weight * deltas[name][linear]).abs()
            assert (without > (2 * u + u * u) * bound[linear] + 1e-14).any()


@every_pair
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_from_is_the_mean_by_the_norms_of_whole_updates(pair, power: float) -> None:
    adapters, deltas = pair_of(pair)
    adapters.combine("both", POSITIVE, "from", power)
    wanted = reference_from(deltas, POSITIVE, power)
    bound = magnitudes(adapters, dict.fromkeys(POSITIVE, sum(POSITIVE.values())))
    adapters.use("both")
    for linear, delta in deltas_of(adapters.model).items():
        exact = sum(share * deltas[name][linear] for name, share in wanted[linear].items())
        assert ((delta - exact).abs() <= 2.0**-22 * bound[linear]).all(), linear
        plain = sum(weight * deltas[name][linear] for name, weight in POSITIVE.items())
        assert ((delta - plain).abs() > 2.0**-22 * bound[linear]).any()


def test_from_minimises_the_distances_weighted_by_the_norms() -> None:
    """The sum over linears of Σ_i w_i ‖ΔW_i‖² ‖ΔW − ΔW_i‖² has no gradient at ΔW / Σ w."""
    adapters, deltas = pair_of(("lora", "furina"))
    adapters.combine("both", POSITIVE, "from")
    adapters.use("both")
    for linear, delta in deltas_of(adapters.model).items():
        mean = (delta / sum(POSITIVE.values())).requires_grad_()
        distances = [
            weight * deltas[name][linear].norm() ** 2 * (mean - deltas[name][linear]).norm() ** 2
            for name, weight in POSITIVE.items()
        ]
        (gradient,) = torch.autograd.grad(sum(distances), mean)
        one_part = 2 * POSITIVE["one"] * deltas["one"][linear].norm() ** 3
        assert gradient.norm() < 1e-5 * one_part


def test_power_zero_is_linear_to_the_bit_and_a_large_power_leaves_the_largest() -> None:
    adapters, deltas = pair_of(("lora", "furina"))
    adapters.combine("linear", POSITIVE)
    adapters.combine("zero", POSITIVE, "from", 0)
    adapters.combine("large", POSITIVE, "from", 300.0)
    found = {}
    for name in ("linear", "zero", "large"):
        adapters.use(name)
        found[name] = furina.adapter_state_dict(adapters.model)
    assert {n: raw(t) for n, t in found["linear"].items()} == {
        n: raw(t) for n, t in found["zero"].items()
    }
    for linear, delta in deltas_of(adapters.model).items():
        largest = max((updates[linear] for updates in deltas.values()), key=Tensor.norm)
        torch.testing.assert_close(delta, 1.1 * largest, rtol=1e-5, atol=1e-6)


numbers = st.floats(1e-3, 1e3)


@given(
    st.lists(st.tuples(st.one_of(st.just(0.0), st.floats(1e-30, 1e30)), numbers), min_size=1),
    st.floats(0, 400),
    numbers,
)
@settings(max_examples=300, deadline=None)
def test_shares_are_finite_sum_to_the_weights_and_do_not_depend_on_the_unit(
    parts, power, unit
) -> None:
    norms, weights = [norm for norm, _ in parts], [weight for _, weight in parts]
    found = coefficients(norms, weights, power)
    assert all(math.isfinite(share) and share >= 0 for share in found)
    assert math.fsum(found) == pytest.approx(math.fsum(weights), rel=1e-12)
    other = coefficients([unit * norm for norm in norms], weights, power)
    assert other == pytest.approx(found, rel=1e-10, abs=1e-12 * math.fsum(weights))
    equal = coefficients([unit] * len(weights), weights, power)
    assert equal == pytest.approx(weights, rel=1e-12)


def test_the_norm_keeps_its_digits_where_factors_cancel() -> None:
    """tr(BᵀB AAᵀ) has none left here: it is off by 1e-16 times the square of the start's norm."""
    layer = layer_of(small("pissa"))
    with torch.no_grad():
        layer.lora_B.add_(1e-10 * torch.ones_like(layer.lora_B))
    b, a = layer.factors()
    exact = layer.delta().norm().item()
    assert frobenius_norm(b, a) == pytest.approx(exact, rel=1e-3)
    trace = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()
    assert trace != pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("rank", [1, 4, 30])
def test_the_norm_is_that_of_the_product_for_every_rank(rank: int) -> None:
    layer = layer_of(small("lora", rank=rank))
    perturb_layer(layer)
    assert frobenius_norm(*layer.factors()) == pytest.approx(layer.delta().norm().item(), rel=1e-12)


@pytest.mark.parametrize(("method", "share"), [("linear", 0.5), ("from", 1.0)])
def test_a_linear_that_one_adapter_has_gets_its_update_alone(method, share: float) -> None:
    adapters, deltas = made(
        ("one", small("lora"), ["q_proj", "up_proj"]),
        ("other", small("furina"), ["up_proj", "model.layers.1.*.v_proj"]),
    )
    adapters.combine("both", {"one": 0.5, "other": 0.5}, method)
    adapters.use("both")
    found, ranks = deltas_of(adapters.model), set()
    assert set(found) == set(deltas["one"]) | set(deltas["other"])
    for linear, delta in found.items():
        owners = [updates[linear] for updates in deltas.values() if linear in updates]
        if len(owners) == 1:
            torch.testing.assert_close(delta, share * owners[0], rtol=1e-5, atol=1e-6)
        ranks.add(state_of(adapters.model).layers[linear].lora_A.shape[0])
    assert ranks == {3 + 24}


def test_updates_of_zero_are_combined_to_zero_by_either_method() -> None:
    adapters = AdapterSet(fresh())
    for name in WEIGHTS:
        adapters.add(name, small("lora"), seed=0)
    for method in ("linear", "from"):
        adapters.combine(method, POSITIVE, method)
        adapters.use(method)
        assert all(not delta.any() for delta in deltas_of(adapters.model).values())


@every_pair
@pytest.mark.parametrize("method", ["linear", "from"])
def test_a_combined_adapter_is_saved_loaded_merged_and_exported_as_a_lora(
    pair, method, tmp_path: Path
) -> None:
    adapters, _ = pair_of(pair)
    adapters.combine("both", POSITIVE, method)
    adapters.use("both")
    model, batch = adapters.model, tokens()
    with torch.no_grad():
        expected = model(**batch).logits
        furina.save(model, tmp_path / "both")
        twin = furina.load(tmp_path / "both", fresh())
        assert torch.equal(twin(**batch).logits, expected)
        furina.merge(model)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-3, atol=1e-4)
        furina.unmerge(model)
        assert torch.equal(model(**batch).logits, expected)
    rank = furina.export_peft(model, tmp_path / "peft")
    config = json.loads((tmp_path / "both" / CONFIG_FILE).read_text())
    assert (config["method"], config["options"]["rank"]) == ("lora", rank)
    assert state_of(model).config.scale == 1.0
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    for linear, delta in deltas_of(model).items():
        a, b = (tensors[f"base_model.model.{linear}.lora_{part}.weight"] for part in "AB")
        assert torch.equal(b.double() @ a.double(), delta)


def test_in_float64_the_combined_model_is_the_one_with_the_sum_in_its_weights() -> None:
    configs = [("one", small("furina"), None), ("other", small("pissa"), ["q_proj"])]
    adapters, deltas = made(*configs, dtype=torch.float64)
    adapters.combine("both", WEIGHTS)
    adapters.use("both")
    plain, batch = fresh(torch.float64), tokens()
    with torch.no_grad():
        before = plain(**batch).logits
        for name, weight in WEIGHTS.items():
            for linear, delta in deltas[name].items():
                plain.get_submodule(linear).weight.add_(weight * delta)
        wanted = plain(**batch).logits
        torch.testing.assert_close(adapters.model(**batch).logits, wanted, rtol=1e-11, atol=1e-12)
    assert (wanted - before).abs().max() > 0.1


def test_combining_changes_neither_the_model_nor_the_parts_nor_the_generator() -> None:
    adapters, _ = pair_of(("furina", "lora"))
    adapters.use("one")
    furina.merge(adapters.model)
    before, state = fingerprint(adapters.model), torch.get_rng_state()
    for method in ("linear", "from"):
        adapters.combine(method, POSITIVE, method)
    assert fingerprint(adapters.model) == before
    assert torch.equal(torch.get_rng_state(), state)
    adapters.combine("again", {"linear": 2.0, "from": 1.0, "one": 1.0})
    adapters.use("again")
    assert state_of(adapters.model).config.rank == 2 * (24 + 3) + 24


def refused(call, *words: str, error: type[FurinaError] = ConfigurationError) -> None:
    """Assert that `call` fails in one sentence that holds `words`."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("method", ["linear", "from"])
@pytest.mark.parametrize("name", [*ROUTED, "dora"])
def test_an_adapter_without_factors_is_refused_by_name(name: str, method) -> None:
    adapters, _ = made(("one", small("lora"), None), ("routed", small(name), None))
    adapters.use("one")
    before = fingerprint(adapters.model)
    refused(
        lambda: adapters.combine("both", {"one": 1.0, "routed": 1.0}, method),
        "Adapter 'routed' cannot be combined",
        error=NotMergeableError,
    )
    assert adapters.names == ("one", "routed") and fingerprint(adapters.model) == before


def test_wrong_weights_methods_and_names_are_one_sentence() -> None:
    adapters, _ = pair_of(("lora", "furina"))
    cases = [
        (({},), ("nothing to combine",)),
        (({"one": 1.0, "othr": 1.0},), ("no adapter 'othr'", "Did you mean 'other'")),
        (({"one": 0.0},), ("weight of adapter 'one' is 0.0", "leave the adapter out")),
        (({"one": math.nan},), ("weight of adapter 'one' is nan",)),
        (({"one": math.inf},), ("is inf", "finite")),
        (({"one": "half"},), ("is 'half'",)),
        (({"one": True},), ("is True",)),
        (({"one": 1.0}, "lineer"), ("'lineer'", "Did you mean 'linear'")),
        (({"one": 1.0, "other": -1.0}, "from"), ("'other' is -1.0", "positive")),
        (({"one": 1.0}, "from", -1.0), ("power=-1.0 must be",)),
        (({"one": 1.0}, "from", math.nan), ("power=nan must be",)),
        (({"one": 1e300},), ("NaN or infinite", "weight is too large")),
    ]
    for arguments, words in cases:
        refused(lambda arguments=arguments: adapters.combine("both", *arguments), *words)
    refused(lambda: adapters.combine("one", {"one": 1.0}), "'one' already")
    assert adapters.names == ("one", "other")


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, Path]:
    """Return the folders of two adapters of the tiny Llama, and of a routed one."""
    folders = {}
    for seed, (name, config) in enumerate(
        {"a": small("furina"), "b": small("lora"), "routed": small("mola")}.items()
    ):
        model = furina.load_backbone("tiny-llama", "float32")
        furina.adapt(model, config, seed=seed)
        perturb(model, seed=seed)
        folders[name] = tmp_path / name
        furina.save(model, folders[name])
    return folders


def combine(*words: object) -> int:
    return cli.main(["combine", *map(str, words), "--backbone", "tiny-llama", "--dtype", "float32"])


@pytest.mark.parametrize("method", ["linear", "from"])
def test_the_command_writes_what_the_set_combines(saved, method, tmp_path: Path, capsys) -> None:
    words = (saved["a"], saved["b"], tmp_path / "both", "--weights", 0.3, 0.9, "--method", method)
    assert combine(*words) == 0
    assert "one LoRA adapter out of 2" in capsys.readouterr().out
    adapters = AdapterSet(furina.load_backbone("tiny-llama", "float32"))
    for name in ("a", "b"):
        adapters.load(name, saved[name])
    adapters.combine("both", {"a": 0.3, "b": 0.9}, method)
    adapters.use("both")
    wanted = furina.adapter_state_dict(adapters.model)
    found = furina.load(tmp_path / "both", furina.load_backbone("tiny-llama", "float32"))
    assert {n: raw(t) for n, t in furina.adapter_state_dict(found).items()} == {
        n: raw(t) for n, t in wanted.items()
    }


def test_the_command_shares_equally_by_default(saved, tmp_path: Path) -> None:
    assert combine(saved["a"], saved["b"], tmp_path / "both") == 0
    assert combine(saved["a"], saved["b"], tmp_path / "same", "--weights", 0.5, 0.5) == 0
    for file in (tmp_path / "both").iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes()


def test_wrong_input_of_the_command_is_one_sentence_and_writes_nothing(
    saved, tmp_path: Path, capsys
) -> None:
    before = sorted(tmp_path.rglob("*"))
    a, b, out = saved["a"], saved["b"], tmp_path / "out"
    cases = [
        ((a, b, out, "--weights", 1), "--weights needs 2 numbers, one for each adapter, not 1."),
        ((a, b, out, "--weights", 1, "much"), "--weights must be a number, not 'much'"),
        ((a, b, out, "--weights", 1, 0), "is 0.0: give a finite number"),
        ((a, b, out, "--weights", -1, 1, "--method", "from"), "positive"),
        ((a, b, out, "--method", "form"), "Did you mean 'from'?"),
        ((a, tmp_path / "absent", out), "absent is not a furina adapter folder"),
        ((a, a, out), "already"),
        ((a, saved["routed"], out), "cannot be combined"),
        ((a, b, a), "exists already: name a new folder"),
        ((a,), "required: out_dir"),
    ]
    for words, expected in cases:
        assert combine(*words) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and len(message.strip().splitlines()) == 1
        assert expected in message, message
    assert sorted(tmp_path.rglob("*")) == before
