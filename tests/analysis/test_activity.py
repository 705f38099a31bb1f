"""Activity linear by linear, against loops; and what must not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

import furina
from furina.adapters.furina import FurinaLinear
from furina.adapters.mixture import MixtureLinear
from furina.analysis.analyse import collect, strongest
from furina.errors import ConfigurationError
from furina.model import selection
from furina.model.selection import choosing, share_sums
from furina.model.state import state_of
from tests.analysis import naive
from tests.helpers import BACKBONES, layer_of, methods, perturb, perturb_layer, small, tokens
from tests.helpers import variants as variants_of

CHOICES = ("num_experts", "allocation", "active_rank")
"""Options of the methods that have experts."""
MIXTURES = [
    name for name in methods() if any(o in small(name).to_dict() for o in CHOICES)
]  # told from the options, as a newcomer would
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in MIXTURES] + [
    ("furina", {"activity": "l1"}),
    ("furina", {"activity": "per_unit", "num_shared_experts": 0}),
    ("furina", {"top_k": 1, "magnitude": "per_expert", "num_experts": 6}),
    ("mola", {"allocation": (2, 5), "top_k": 3}),
]


def adapted(method: str, backbone: str = "llama", **options: Any) -> nn.Module:
    model = furina.adapt(BACKBONES[backbone](torch.float64), small(method, **options), seed=0)
    perturb(model)
    return model


def batches() -> list[dict[str, Tensor]]:
    return [tokens(seed=1), tokens(2, 5, seed=2)]


@pytest.mark.parametrize(("method", "options"), CASES)
def test_the_sums_are_those_of_loops_over_tokens_and_experts(
    method: str, options: dict[str, Any]
) -> None:
    model = adapted(method, **options)
    found = collect(model, batches())
    names = list(found)
    assert names == [n for n in state_of(model).layers if n in names], "in the model's order"
    heard = [naive.inputs(model, names, batch) for batch in batches()]
    count = sum(int(batch["attention_mask"].sum()) for batch in batches())
    for name in names[:2] + names[-2:]:
        layer = model.get_submodule(name)
        x = torch.cat([each[name] for each in heard])
        assert len(x) == count
        expected = naive.numbers(naive.shares(layer, x), layer.most_active)
        sums = found[name]
        assert sums.top_k_share.item() / count == pytest.approx(expected["top_k_share"], rel=1e-9)
        assert sums.entropy.item() / count == pytest.approx(expected["entropy"], rel=1e-9)
        load = (sums.selected / sums.selected.sum()).tolist()
        assert load == pytest.approx(expected["frequency"])
        assert (sums.share / count).tolist() == pytest.approx(expected["share"], rel=1e-9)
        assert (sums.first / count).tolist() == pytest.approx(expected["first"])


@pytest.mark.parametrize("method", MIXTURES)
def test_a_linear_takes_part_exactly_where_tokens_choose(method: str) -> None:
    names = list(collect(adapted(method), batches()))
    per_block = [f"model.layers.{layer}.mlp.gate_proj" for layer in range(2)]
    assert names == per_block if method == "mixlora" else len(names) == 14


@pytest.mark.parametrize("method", MIXTURES)
def test_neither_padding_nor_the_batch_size_nor_the_chunk_changes_the_sums(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = adapted(method), tokens(4, 9, seed=3)
    expected = collect(model, [batch])
    rows = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(4)]
    longer = {
        "input_ids": pad(batch["input_ids"], (0, 5), value=17),
        "attention_mask": pad(batch["attention_mask"], (0, 5)),
    }
    others = [rows, [longer], [longer] * 2]
    found = [collect(model, each) for each in others]
    monkeypatch.setattr(selection, "CHUNK", 3)
    found.append(collect(model, [batch]))
    for factor, sums in zip((1, 1, 2, 1), found, strict=True):
        for name, each in sums.items():
            for value, wanted in zip(each, expected[name], strict=True):
                torch.testing.assert_close(value, factor * wanted, rtol=1e-6, atol=1e-9)


def test_the_mode_the_hooks_and_the_records_are_left_as_they_were() -> None:
    model = adapted("furina").train()
    model.get_submodule("model.layers.0").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    collect(model, batches())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert hooks == {n: len(module._forward_pre_hooks) for n, module in model.named_modules()}
    assert state_of(model).tracker.active is None


def test_dropout_is_off() -> None:
    model = adapted("furina", dropout=0.5).train()
    first, second = collect(model, batches()), collect(model, batches())
    assert all(torch.equal(first[name].share, second[name].share) for name in first)


@pytest.mark.parametrize("method", [name for name in methods() if name not in MIXTURES])
def test_a_method_without_experts_is_refused(method: str) -> None:
    said = rf"^This {method} adapter has no experts to select from: it is no mixture of experts\.$"
    with pytest.raises(ConfigurationError, match=said):
        choosing(adapted(method))


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("furina", {"num_experts": 2, "selection_coefficient": 0.0}, "fewer than 2 self-routed"),
        ("mixlora", {"router_removed": True}, "it has no router"),
        ("molora", {"num_experts": 1}, "it has no router"),
        ("flylora", {"active_rank": 3}, "all ranks act on every token"),
        ("flylora", {"selection": "signed"}, "signed scores"),
    ],
)
def test_options_that_leave_nothing_to_select_are_refused_with_the_reason(
    method: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"no experts to select from: .*{said}"):
        choosing(adapted(method, **options))


def test_a_merged_model_is_refused() -> None:
    model = adapted("furina")
    furina.merge(model)
    with pytest.raises(ConfigurationError, match="merged"):
        collect(model, batches())


def test_a_linear_that_took_no_part_is_named() -> None:
    model = adapted("molora")
    layer = model.get_submodule("model.layers.1.mlp")
    layer.forward = lambda x: x  # goes around its linears
    with pytest.raises(ConfigurationError, match=r"layers.1.mlp.gate_proj took no part"):
        collect(model, batches())


def shares_of(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)[:, None]


def test_equal_experts_have_entropy_1_and_the_share_k_of_n() -> None:
    sums = share_sums(torch.full((6, 1, 5), 0.2, dtype=torch.float64), 2)
    assert sums.entropy.item() / 6 == pytest.approx(1)
    assert sums.top_k_share.item() / 6 == pytest.approx(2 / 5)
    assert sums.selected.sum() == 12 and sums.first.sum() == 6
    assert (sums.share / 6).tolist() == pytest.approx([0.2] * 5)


def test_one_expert_alone_has_entropy_0_and_the_whole_share() -> None:
    sums = share_sums(shares_of([[0.0, 0.0, 1.0, 0.0]] * 3), 1)
    assert (sums.entropy.item(), sums.top_k_share.item()) == (0, 3)
    for name in ("selected", "share", "first"):
        assert getattr(sums, name).tolist() == [0, 0, 3, 0]


def test_more_than_all_experts_cannot_be_the_most_active() -> None:
    sums = share_sums(shares_of([[0.9, 0.1], [0.2, 0.8]]), 5)
    assert sums.top_k_share.item() == pytest.approx(2)
    assert sums.selected.tolist() == [2, 2] and sums.first.tolist() == [1, 1]


def test_units_that_weigh_apart_count_as_parts_of_a_token() -> None:
    p = torch.tensor([[[0.7, 0.3], [0.1, 0.9]]], dtype=torch.float64)
    sums = share_sums(p, 1)
    assert sums.top_k_share.item() == pytest.approx(0.8)
    assert sums.selected.tolist() == [0.5, 0.5]
    assert sums.share.tolist() == pytest.approx([0.4, 0.6])


def test_experts_without_a_direction_are_equally_active() -> None:
    layer = layer_of(small("furina", num_experts=5, start="zero_b")).eval()
    assert isinstance(layer, MixtureLinear)
    p = layer.activity(torch.randn(6, 11, dtype=torch.float64))
    torch.testing.assert_close(p, torch.full((6, 1, 4), 0.25, dtype=torch.float64))


def test_the_only_expert_with_a_direction_has_all_activity() -> None:
    layer = layer_of(small("furina", num_experts=5))
    perturb_layer(layer)
    assert isinstance(layer, FurinaLinear)
    with torch.no_grad():
        layer.lora_Bt.view(5, -1, 7)[[1, 2, 4]] = 0
    p = layer.activity(torch.randn(6, 11, dtype=torch.float64))
    assert (p[:, 0, 2] > 1 - 1e-4).all()
    sums = share_sums(p, 2)
    assert sums.first.tolist() == [0, 0, 6, 0] and sums.entropy.item() < 1e-3


def test_the_parts_add_up_to_the_update_for_every_switch() -> None:
    seen = 0
    for config in variants_of("furina"):
        layer = layer_of(config).eval()
        perturb_layer(layer)
        assert isinstance(layer, FurinaLinear)
        x = torch.randn(6, 11, dtype=torch.float64)
        with torch.no_grad():
            update = layer(x) - layer.base(x)
            parts = layer.parts(x)
        assert parts is not None
        torch.testing.assert_close(parts.shared + parts.routed, update, rtol=1e-9, atol=1e-11)
        if config.start != "subtract":
            seen += 1
            norms = [part.norm(dim=1).mean().item() for part in parts]
            assert norms == pytest.approx(naive.norms(layer, x), rel=1e-9)
            assert min(norms) > 1e-3
    assert seen > 5


def test_the_norms_are_summed_over_real_tokens() -> None:
    model = adapted("furina")
    found = collect(model, batches())
    names = list(found)[:3]
    heard = [naive.inputs(model, names, batch) for batch in batches()]
    for name in names:
        x = torch.cat([each[name] for each in heard])
        mean = (found[name].norms / len(x)).tolist()
        assert mean == pytest.approx(naive.norms(model.get_submodule(name), x), rel=1e-9)


@pytest.mark.parametrize("experts", [{"num_shared_experts": 0}, {"num_shared_experts": 4}])
def test_there_are_no_parts_without_shared_or_without_routed_experts(
    experts: dict[str, Any],
) -> None:
    layer = layer_of(small("furina", num_experts=4, selection_coefficient=0.0, **experts))
    assert isinstance(layer, FurinaLinear)
    assert layer.parts(torch.randn(2, 11, dtype=torch.float64)) is None
    assert layer_of(small("mola")).parts(torch.randn(2, 11, dtype=torch.float64)) is None


def test_the_most_active_expert_of_each_token_is_told_with_its_share() -> None:
    for kind in ("l2", "per_unit"):
        model, batch = adapted("furina", activity=kind), tokens(1, 7)
        name = "model.layers.1.mlp.down_proj"
        layer = model.get_submodule(name)
        found = strongest(model, batch, [layer])
        assert list(found) == [name]
        expert, share = (each.tolist() for each in found[name])
        x = naive.inputs(model, [name], batch)[name]
        for t, units in enumerate(naive.shares(layer, x)):
            mean = [sum(unit[i] for unit in units) / len(units) for i in range(len(units[0]))]
            assert (expert[t], share[t]) == (mean.index(max(mean)), pytest.approx(max(mean)))


def test_a_model_that_cannot_leave_logits_out_is_read_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted("furina")
    expected = collect(model, batches())
    own = type(model).forward

    def forward(
        self: nn.Module, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False
    ) -> object:
        return own(self, input_ids, attention_mask, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", forward)
    found = collect(model, batches())
    assert list(found) == list(expected)
    for name, sums in expected.items():
        assert all(map(torch.equal, found[name], sums))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


def test_the_l2_activity_never_forms_every_experts_output_for_every_token() -> None:
    largest = {}
    x = torch.randn(60, 11, dtype=torch.float64)
    for kind in ("l2", "l1"):
        layer = layer_of(small("furina", num_experts=9, activity=kind), out_features=200)
        perturb_layer(layer)
        with Largest() as seen:
            selection.selection_sums(layer, x)
        largest[kind] = seen.entries
    assert largest["l2"] <= 60 * 200 < 60 * 8 * 200 <= largest["l1"]
