"""What balances the experts: auxiliary losses loop by loop, and what moves without gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.errors import ConfigurationError
from furina.model.state import state_of
from tests.adapters import loops
from tests.helpers import BACKBONES, chain, perturb, small, tokens

EXACT = {"rtol": 1e-10, "atol": 1e-12}


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


def test_a_row_of_padding_alone_does_not_move_loramoes_loss() -> None:
    model = routed_model("loramoe", balance_coefficient=0.3, task_type=1)
    batch = tokens()
    model(**batch)
    expected = furina.auxiliary_loss(model)
    model(**{name: nn.functional.pad(value, (0, 0, 0, 1)) for name, value in batch.items()})
    torch.testing.assert_close(furina.auxiliary_loss(model), expected, rtol=1e-12, atol=0)


def test_loramoe_needs_types_sequences_and_two_halves() -> None:
    model = routed_model("loramoe", balance_coefficient=0.1)
    with pytest.raises(ConfigurationError, match="needs the type of every sequence"):
        model(**tokens())
    with pytest.raises(ConfigurationError, match="even, for two halves"):
        small("loramoe", balance_coefficient=0.1, num_experts=3)
    flat = chain(small("loramoe", balance_coefficient=0.1, task_type=0)).train()
    with pytest.raises(ConfigurationError, match=r"must be \(batch, sequence, features\)"):
        flat(torch.randn(9, 11, dtype=torch.float64))


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
                {name: m._selected(x[0], x[0] @ m.lora_A.T)[batch["attention_mask"] != 0]}
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
