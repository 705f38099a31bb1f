"""The padding mask reaches every layer, in every forward it belongs to, and nothing outlives it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import furina
from furina.adapters import AdapterConfig
from furina.errors import ConfigurationError
from furina.kernels.forward import Forward
from furina.model.state import state_of
from tests.helpers import BACKBONES, chain, fingerprint, perturb, small, task_loss, tokens

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def adapted(backbone: str = "llama", dtype: torch.dtype = torch.float64, **options: object):
    model = furina.adapt(
        BACKBONES[backbone](dtype), small("furina", num_experts=5, **options), seed=0
    )
    perturb(model)
    return model.train()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in furina.adapter_parameters(model).items()}
    model.zero_grad()
    return found


def enable_checkpointing(model: nn.Module, reentrant: bool = False) -> None:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})


def total(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return task_loss(model, batch) + 10 * furina.auxiliary_loss(model)


def batches() -> list[dict[str, Tensor]]:
    """Return two batches of one shape with different masks."""
    first, second = tokens(seed=1), tokens(seed=2)
    second["attention_mask"] = second["attention_mask"].flip(0)
    return [first, second]


@every_backbone
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_gradient_with_the_loss_on(backbone: str, dropout: float) -> None:
    model = adapted(backbone, dropout=dropout)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model)
        torch.manual_seed(7)
        loss = total(model, tokens())
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    (plain_loss, plain), (loss, again) = found
    assert torch.equal(plain_loss, loss)
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


@pytest.mark.parametrize("order", [(0, 1), (1, 0), None])
def test_two_forwards_before_either_backward_keep_their_own_masks(order) -> None:
    model = adapted(dropout=0.2)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model)
        torch.manual_seed(7)
        losses = [total(model, batch) for batch in batches()]
        if order is None:
            (losses[0] + losses[1]).backward()
        else:
            for index in order:
                losses[index].backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-14)


def test_a_recomputation_sees_the_mask_of_its_own_forward(monkeypatch) -> None:
    """The test above would pass if the mask did not matter to recomputation; here it is read."""
    model, seen = adapted(), []
    real_tokens = Forward.real_tokens

    def spy(self: Forward, inputs: Tensor, layer: str) -> Tensor | None:
        mask = real_tokens(self, inputs, layer)
        seen.append((layer, mask.flatten().tolist()))
        return mask

    monkeypatch.setattr(Forward, "real_tokens", spy)
    enable_checkpointing(model)
    first, second = (total(model, batch) for batch in batches())
    masks = [(batch["attention_mask"] != 0).flatten().tolist() for batch in batches()]
    assert masks[0] != masks[1]
    for loss, mask in ((second, masks[1]), (first, masks[0])):
        seen.clear()
        loss.backward()
        layers = set(state_of(model).layers)  # recomputation stops when all that was saved is back
        assert {name for name in layers if "down_proj" not in name} <= {name for name, _ in seen}
        assert all(found == mask for _, found in seen)


def test_a_forward_without_gradients_between_forward_and_backward_changes_nothing() -> None:
    model = adapted()
    enable_checkpointing(model)
    total(model, tokens()).backward()
    expected = gradients(model)
    loss = total(model, tokens())
    with torch.no_grad():
        model(**batches()[1])
    loss.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name])


def test_the_loss_alone_can_go_backward_under_checkpointing() -> None:
    model = adapted()
    model(**tokens())
    furina.auxiliary_loss(model).backward()
    named = furina.adapter_parameters(model)
    expected = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    model.zero_grad()
    enable_checkpointing(model)
    model(**tokens())
    furina.auxiliary_loss(model).backward()
    assert {name for name, p in named.items() if p.grad is not None} == set(expected)
    assert all(torch.equal(named[name].grad, value) for name, value in expected.items())


def test_reentrant_checkpointing_is_refused_in_one_sentence_while_the_loss_is_on() -> None:
    model = adapted()
    enable_checkpointing(model, reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ConfigurationError, match="use_reentrant=False") as caught:
        model(**tokens())
    assert "\n" not in str(caught.value)


def test_reentrant_checkpointing_works_where_there_is_no_loss_to_carry() -> None:
    model = furina.adapt(BACKBONES["llama"](torch.float64), small("lora"), seed=0).train()
    perturb(model)
    task_loss(model, tokens()).backward()
    expected = gradients(model)
    enable_checkpointing(model, reentrant=True)
    model.enable_input_require_grads()
    task_loss(model, tokens()).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)


def test_removing_gives_the_checkpoint_functions_back() -> None:
    model = BACKBONES["llama"]()
    enable_checkpointing(model)
    before = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    model.train()
    state = fingerprint(model)
    furina.adapt(model, "furina", seed=0, dropout=0.0)
    total(model, tokens()).backward()
    furina.remove(model)
    after = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert fingerprint(model) == state


@pytest.mark.parametrize("passing", ["keyword", "position"])
def test_the_mask_is_found_however_it_is_passed(passing: str) -> None:
    model, batch = adapted(), tokens()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    model(input_ids=ids, attention_mask=mask)
    expected = furina.auxiliary_loss(model)
    if passing == "position":
        model(ids, mask)
    else:
        model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask.bool())
    assert torch.equal(furina.auxiliary_loss(model), expected)
    assert furina.auxiliary_tokens(model) == mask.sum()


def test_a_mask_that_is_not_one_of_tokens_is_refused() -> None:
    model, batch = adapted(), tokens()
    batch["attention_mask"] = torch.ones(3, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(ConfigurationError, match=r"\(batch, sequence\)"):
        model(**batch)
    model = chain(small("furina")).train()
    with pytest.raises(ConfigurationError, match=r"first saw 12 token vectors .* 15 positions"):
        model(torch.randn(3, 4, 11, dtype=torch.float64), torch.ones(3, 5))


def test_a_linear_that_sees_other_tokens_than_the_model_is_refused_without_a_mask() -> None:
    model = chain(small("furina")).train()
    own = model.second.forward
    model.second.forward = lambda x: own(x[:1])
    with pytest.raises(ConfigurationError, match=r"second saw 4 token vectors .* 12 positions"):
        model(torch.randn(3, 4, 11, dtype=torch.float64))


def test_a_forward_that_fails_leaves_no_forward_open() -> None:
    model = adapted()
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    assert state_of(model).tracker.active is None
    with pytest.raises(ConfigurationError, match="took no part"), pytest.warns(UserWarning):
        furina.auxiliary_loss(model)


@pytest.mark.parametrize("quiet", ["eval", "no_grad", "inference_mode", "generate", "record"])
def test_a_forward_outside_training_leaves_the_last_training_forward(quiet: str) -> None:
    model, batch = adapted(), tokens()
    ids = batch["input_ids"][:1]
    expected = total(model, batch)
    expected.backward()
    wanted = gradients(model)
    loss = task_loss(model, batch)
    tracker = state_of(model).tracker
    last = tracker.last
    if quiet == "eval":
        model.eval()(**tokens(seed=5))
        model.train()
    elif quiet == "generate":
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    elif quiet == "record":
        with furina.record_selection(model), torch.no_grad():
            model(**tokens(seed=5))
    else:
        with getattr(torch, quiet)():
            model(**tokens(seed=5))
    assert tracker.active is None and tracker.last is last
    if quiet == "no_grad":
        furina.auxiliary_loss(model)
        with torch.no_grad():
            model(**tokens(seed=5))
        assert not last.records, "a validation must not hold what training recorded"
    found = loss + 10 * furina.auxiliary_loss(model)
    assert torch.equal(found, expected)
    found.backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, wanted[name])


def test_a_part_of_the_model_called_by_itself_has_no_loss_and_says_so() -> None:
    model, batch = adapted(), tokens()
    total(model, batch)
    model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with pytest.raises(ConfigurationError, match="no forward of the whole model"):
        furina.auxiliary_loss(model)


def test_a_training_loop_that_never_asks_for_the_loss_is_warned_once() -> None:
    model, batch = adapted(), tokens()
    with pytest.warns(UserWarning, match="Nobody asked for the auxiliary loss") as caught:
        for _ in range(8):
            task_loss(model, batch).backward()
    assert len(caught) == 1


@pytest.mark.parametrize("quiet", ["read", "off", "eval", "two forwards a loss"])
def test_a_loop_that_misses_nothing_is_not_warned(quiet: str) -> None:
    options = {"selection_coefficient": 0.0} if quiet == "off" else {}
    model, batch = adapted(**options), tokens()
    model.train(quiet != "eval")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(8):
            task_loss(model, batch)
            if quiet == "read" or (quiet == "two forwards a loss" and step % 2):
                furina.auxiliary_loss(model)


def whole_layers(model: nn.Module) -> None:
    """Checkpoint as a user would, by torch alone."""
    model.config.use_cache = False
    for layer in model.model.layers:
        layer.forward = partial(
            torch.utils.checkpoint.checkpoint, layer.forward, use_reentrant=False
        )


@pytest.mark.parametrize("method", furina.methods())
def test_a_users_own_checkpointing_changes_no_gradient(method: str) -> None:
    options = {"balance_coefficient": 0.1, "task_type": 1} if method == "loramoe" else {}
    compare_with_own_checkpointing(small(method, **options))


@pytest.mark.parametrize("activity", ["l2", "l1", "per_unit"])
@pytest.mark.parametrize("detach_norm", [False, True])
def test_a_users_own_checkpointing_carries_each_activity(activity: str, detach_norm: bool) -> None:
    options = {"activity": activity, "detach_norm": detach_norm}
    compare_with_own_checkpointing(small("furina", num_experts=5, **options))


def compare_with_own_checkpointing(config: AdapterConfig) -> None:
    model = furina.adapt(BACKBONES["llama"](torch.float64), config, seed=0)
    perturb(model)
    model.train()
    total(model, tokens()).backward()
    expected = gradients(model)
    whole_layers(model)
    total(model, tokens()).backward()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("activity", ["l2", "l1", "per_unit"])
def test_a_part_in_eval_mode_keeps_its_share_of_the_loss(activity: str) -> None:
    model, batch = adapted(activity=activity), tokens()
    total(model, batch).backward()
    expected = gradients(model)
    model.model.layers[0].eval()
    total(model, batch).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_an_adapted_model_can_be_copied_after_a_forward(way: str) -> None:
    model = adapted()
    if way == "deepcopy":  # transformers' own hook for checkpointing cannot be pickled
        enable_checkpointing(model)
    loss = total(model, tokens())
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    loss.backward()
    expected = gradients(model)
    with torch.no_grad():
        for parameter in furina.adapter_parameters(model).values():
            parameter.zero_()
    total(twin, tokens()).backward()
    for name, gradient in gradients(twin).items():
        assert torch.equal(gradient, expected[name])
    assert state_of(twin).tracker is not state_of(model).tracker
    furina.merge(twin)
    furina.unmerge(twin)
    furina.remove(twin)
    assert not furina.is_adapted(twin)
    twin.train()(**tokens())
    assert furina.is_adapted(model)


def test_a_recomputed_layer_is_not_recorded_a_second_time() -> None:
    model = adapted()
    enable_checkpointing(model)
    loss = task_loss(model, tokens())
    last = state_of(model).tracker.last
    assert last is not None
    before = dict(last.records)
    loss.backward()
    assert before
    assert last.records.keys() == before.keys()
    assert all(last.records[name] is record for name, record in before.items())


def test_the_records_are_dropped_once_the_loss_is_read_and_recomputation_adds_none() -> None:
    model = adapted()
    enable_checkpointing(model)
    loss = total(model, tokens())
    last = state_of(model).tracker.last
    assert last is not None and last.loss is not None and not last.records
    loss.backward()
    assert not last.records
