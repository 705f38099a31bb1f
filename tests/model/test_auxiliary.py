"""The auxiliary loss is that of one micro-batch's real tokens, over all ranks, counted once."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import furina
from furina import reference
from furina.adapters.furina import FurinaConfig, FurinaLinear
from furina.errors import ConfigurationError
from furina.model.state import state_of
from tests.helpers import BACKBONES, chain, perturb, small, tokens

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
EXPERTS = 5


def adapted(backbone: str = "llama", dtype: torch.dtype = torch.float64, **options: object):
    config = small("furina", num_experts=EXPERTS, **options)
    model = furina.adapt(BACKBONES[backbone](dtype), config, seed=0)
    perturb(model)
    return model.train()


def padded(batch: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """Add pad tokens, whose ids are arbitrary, on both sides of the same positions."""
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    fills = {"input_ids": 5, "attention_mask": 0, "labels": -100, "position_ids": 0}
    return {
        name: nn.functional.pad(value, (left, right), value=fills[name])
        for name, value in (batch | {"position_ids": positions}).items()
    }


@every_backbone
@pytest.mark.parametrize("activity", ["l2", "l1", "per_unit"])
@pytest.mark.parametrize("sides", [(0, 3), (2, 0), (1, 4)])
def test_pad_tokens_change_neither_outputs_nor_loss_nor_gradients(
    backbone, activity, sides
) -> None:
    model, batch = adapted(backbone, activity=activity), tokens()
    found = []
    for current in (padded(batch, 0, 0), padded(batch, *sides)):
        real = current["attention_mask"] != 0
        logits = model(**current).logits[real]
        loss = furina.auxiliary_loss(model)
        trained = list(furina.adapter_parameters(model).values())
        pulls = torch.autograd.grad(loss, trained, allow_unused=True)
        found.append((logits, loss, pulls))
        assert furina.auxiliary_tokens(model) == batch["attention_mask"].sum()
    (logits, loss, pulls), (more_logits, more_loss, more_pulls) = found
    torch.testing.assert_close(more_logits, logits, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(more_loss, loss, rtol=1e-10, atol=0)
    for one, other in zip(pulls, more_pulls, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-10)


def test_what_the_pad_positions_hold_is_without_influence() -> None:
    model, batch = adapted(), tokens()
    model(**batch)
    loss = furina.auxiliary_loss(model)
    other = dict(batch)
    other["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 17)
    model(**other)
    torch.testing.assert_close(furina.auxiliary_loss(model), loss, rtol=1e-13, atol=0)


def test_the_loss_of_a_model_is_the_reference_summed_over_its_linears() -> None:
    model, batch, heard = adapted(), tokens(), {}
    for name, layer in state_of(model).layers.items():
        layer.register_forward_pre_hook(lambda _, x, name=name: heard.update({name: x[0]}))
    model(**batch)
    expected = sum(
        sum(reference.selection_loss(loudness(layer, heard[name], batch["attention_mask"]), 2))
        for name, layer in state_of(model).layers.items()
    )
    torch.testing.assert_close(furina.auxiliary_loss(model), 0.01 * expected, rtol=1e-10, atol=0)


def loudness(layer: FurinaLinear, x: Tensor, mask: Tensor) -> Tensor:
    """Return the reference's activities of the real tokens."""
    config = layer.config
    a = layer.lora_A.view(config.num_experts, config.rank, -1)
    b = layer.lora_B.view(-1, config.num_experts, config.rank).transpose(0, 1)
    unit = [
        reference.direction(a[e], b[e], config.eps)
        for e in range(config.num_shared_experts, config.num_experts)
    ]
    return reference.activity(x[mask != 0], torch.stack(unit), config.activity, config.eps)


def test_accumulation_is_the_token_weighted_mean_of_the_micro_batches_losses() -> None:
    """Stated for what it is: the loss of the whole batch differs, as balance is not linear."""
    model, batch = adapted(), tokens()
    losses, counts = [], []
    for row in range(3):
        model(**{name: value[row : row + 1] for name, value in batch.items()})
        losses.append(furina.auxiliary_loss(model).item())
        counts.append(furina.auxiliary_tokens(model).item())
    assert counts == batch["attention_mask"].sum(1).tolist()
    weighted = sum(t * loss for t, loss in zip(counts, losses, strict=True)) / sum(counts)
    model(**batch)
    whole = furina.auxiliary_loss(model).item()
    assert weighted == pytest.approx(whole, rel=0.2)
    assert weighted != pytest.approx(whole, rel=1e-6)


def test_reading_the_loss_twice_or_running_twice_counts_once() -> None:
    model, batch = adapted(), tokens()
    model(**batch)
    first = furina.auxiliary_loss(model)
    assert torch.equal(furina.auxiliary_loss(model), first)
    model(**batch)
    assert torch.equal(furina.auxiliary_loss(model), first)


def test_the_last_forward_counts() -> None:
    model = adapted()
    model(**tokens(seed=1))
    first = furina.auxiliary_loss(model)
    model(**tokens(seed=2))
    assert not torch.equal(furina.auxiliary_loss(model), first)


@pytest.mark.parametrize("method", furina.methods())
def test_there_is_no_loss_before_a_training_forward(method: str) -> None:
    model = chain(small(method)).train()
    with pytest.raises(ConfigurationError, match=r"call model.train\(\) and run the model first"):
        furina.auxiliary_loss(model)
    with pytest.raises(ConfigurationError, match="has no adapter"):
        furina.auxiliary_loss(nn.Linear(2, 2))


def test_a_method_without_a_loss_gives_zero() -> None:
    for config in (small("lora"), small("furina", selection_coefficient=0.0)):
        model = chain(config).train()
        x = torch.randn(2, 3, 11, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)
            loss = furina.auxiliary_loss(model)
        assert loss == 0 and loss.shape == () and not loss.requires_grad


def test_a_missing_mask_is_warned_about_and_then_every_token_is_real() -> None:
    model = chain(small("furina")).train()
    perturb(model)
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    model(x, torch.ones(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = furina.auxiliary_loss(model)
    model(x)
    with pytest.warns(UserWarning, match="counts padding as real tokens"):
        assert torch.equal(furina.auxiliary_loss(model), expected)
    assert furina.auxiliary_tokens(model) == 6


def test_a_micro_batch_without_a_real_token_has_a_finite_loss_and_no_gradient() -> None:
    model = chain(small("furina")).train()
    perturb(model)
    model(torch.randn(2, 3, 11, dtype=torch.float64), torch.zeros(2, 3))
    loss = furina.auxiliary_loss(model)
    assert loss.isfinite() and furina.auxiliary_tokens(model) == 0
    loss.backward()
    gradients = [p.grad for p in furina.adapter_parameters(model).values()]
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("method", furina.methods())
def test_without_a_mask_every_position_is_counted_whatever_the_method(method: str) -> None:
    model = furina.adapt(BACKBONES["llama"](), small(method), seed=0).train()
    ids = tokens()["input_ids"]
    model(input_ids=ids)
    assert furina.auxiliary_tokens(model) == ids.numel()
    model(inputs_embeds=model.get_input_embeddings()(ids))
    assert furina.auxiliary_tokens(model) == ids.numel()


def test_a_linear_that_took_no_part_is_named() -> None:
    model = chain(small("furina")).train()
    model.second.forward = model.second.base.forward  # goes around the adapter
    with pytest.raises(ConfigurationError, match="1 adapted linears, such as second"):
        model(torch.randn(2, 3, 11, dtype=torch.float64), torch.ones(2, 3))
        furina.auxiliary_loss(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_of_a_low_precision_backbone_is_fp32_and_close_to_float64(dtype) -> None:
    found = []
    for current in (dtype, torch.float64):
        model = furina.adapt(
            BACKBONES["llama"](dtype), small("furina", num_experts=EXPERTS), seed=0
        )
        perturb(model)
        (model.double() if current == torch.float64 else model).train()(**tokens())
        found.append(furina.auxiliary_loss(model))
        found[-1].backward()
    assert found[0].dtype == torch.float32
    assert found[0].item() == pytest.approx(found[1].item(), rel=20 * torch.finfo(dtype).eps)


def test_autocast_keeps_norms_and_activities_in_fp32_and_the_gradients_finite(monkeypatch) -> None:
    model, batch, cast = adapted(dtype=torch.float32), tokens(), []
    statistics = FurinaConfig.statistics

    def spy(self: FurinaConfig, records: object, mask: Tensor | None) -> object:
        cast.append(torch.is_autocast_enabled("cpu"))
        return statistics(self, records, mask)

    monkeypatch.setattr(FurinaConfig, "statistics", spy)
    layer = next(iter(state_of(model).layers.values()))
    exact = layer.derive()
    model(**batch)
    expected = furina.auxiliary_loss(model).item()
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer.derive()
        loss = model(**batch).loss + furina.auxiliary_loss(model)
        found = furina.auxiliary_loss(model).item()
    assert torch.equal(exact.b, inside.b) and torch.equal(exact.extra[0], inside.extra[0])
    assert found == pytest.approx(expected, rel=0.05)
    assert cast and not any(cast)
    loss.backward()
    for name, parameter in furina.adapter_parameters(model).items():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(**batch).logits.isfinite().all()


@pytest.mark.parametrize("mode", [True, False])
def test_record_selection_equals_the_direct_computation(mode: bool) -> None:
    model, heard = adapted().train(mode), []
    layers = state_of(model).layers
    name = "model.layers.1.mlp.down_proj"
    layer = layers[name]
    assert isinstance(layer, FurinaLinear)
    batches = [tokens(seed=1), tokens(2, 5, seed=2)]
    layer.register_forward_pre_hook(lambda _, x: heard.append(x[0]))
    with furina.record_selection(model) as record, torch.no_grad():
        for batch in batches:
            model(**batch)
    pairs = zip(heard, batches, strict=True)
    loud = torch.cat([loudness(layer, x, batch["attention_mask"]) for x, batch in pairs])
    share = (loud / loud.sum(-1, keepdim=True)).squeeze(1)
    assert record.tokens == len(share) == sum(int(b["attention_mask"].sum()) for b in batches)
    assert set(record.top_k_share()) == set(layers)
    expected = share.topk(2).values.sum(1).mean().item()
    assert record.top_k_share()[name] == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(record.activity_share()[name], share.mean(0), rtol=1e-10, atol=0)
    shares = record.top_k_share().values()
    assert record.mean_top_k_share() == pytest.approx(sum(shares) / len(layers))
    assert all(2 / (EXPERTS - 1) <= value <= 1 for value in shares)


def test_recording_works_with_the_loss_off_and_leaves_nothing_behind() -> None:
    model = adapted(selection_coefficient=0.0).eval()
    with furina.record_selection(model) as record, torch.inference_mode():
        model(**tokens())
    assert len(record.top_k_share()) == 14
    tracker = state_of(model).tracker
    assert tracker.active is None and tracker.last is None


def test_records_inside_one_another_see_each_forward_of_theirs() -> None:
    model, batch = adapted(), tokens()
    with torch.no_grad(), furina.record_selection(model) as outer:
        model(**batch)
        with furina.record_selection(model) as inner:
            model(**batch)
        model(**batch)
    real = int(batch["attention_mask"].sum())
    assert (outer.tokens, inner.tokens) == (3 * real, real)
    assert outer.mean_top_k_share() == pytest.approx(inner.mean_top_k_share(), rel=1e-12)


def test_recording_while_generating_counts_each_real_token_once() -> None:
    model, batch = adapted().eval(), tokens(2, 5)
    left = {
        "input_ids": batch["input_ids"].flip(1),
        "attention_mask": batch["attention_mask"].flip(1),
    }
    with furina.record_selection(model) as record:
        made = model.generate(**left, max_new_tokens=3, do_sample=False, eos_token_id=None)
    # The last token that is generated is not read.
    mask = nn.functional.pad(left["attention_mask"], (0, 2), value=1)
    with torch.no_grad(), furina.record_selection(model) as expected:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(input_ids=made[:, :-1], attention_mask=mask, position_ids=places)
    assert record.tokens == expected.tokens == int(mask.sum())
    assert record.mean_top_k_share() == pytest.approx(expected.mean_top_k_share(), rel=1e-9)


def test_recording_in_training_changes_neither_records_nor_checkpointed_gradients() -> None:
    model = adapted(selection_coefficient=0.0, activity="l1")
    model.activation_checkpointing_enable({"use_reentrant": False})
    with furina.record_selection(model) as record:
        loss = model(**tokens()).loss
    loss.backward()
    assert record.tokens == int(tokens()["attention_mask"].sum())


def test_recording_adds_nothing_to_what_slim_moves_after_a_step() -> None:
    model = furina.adapt(BACKBONES["llama"](), small("slim"), seed=0).train()
    with furina.record_selection(model) as record, torch.no_grad():
        model(**tokens())
    assert record.tokens > 0
    assert all(layer.step_statistics() is None for layer in state_of(model).layers.values())


def test_an_output_head_that_sees_a_part_of_the_tokens_is_refused_with_the_reason() -> None:
    model = furina.adapt(
        BACKBONES["llama"](), small("furina"), targets=["q_proj", "lm_head"], seed=0
    ).train()
    with pytest.raises(ConfigurationError, match="leave this linear out of the targets"):
        model(**{k: v for k, v in tokens().items() if k != "labels"}, logits_to_keep=1)


@pytest.mark.parametrize(
    "config", [small("lora"), small("furina", top_k=7, selection_coefficient=0.0)]
)
def test_recording_a_method_without_a_selection_is_an_error(config) -> None:
    with pytest.raises(ConfigurationError), furina.record_selection(chain(config)):
        pass


SIZES = (2, 3)  # rows of the two ranks
LENGTH = 4


def rank_batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(sum(SIZES), LENGTH, 11, generator=generator, dtype=torch.float64)
    mask = torch.ones(sum(SIZES), LENGTH)
    mask[1, 1:] = 0
    mask[4, 2:] = 0
    rows = [slice(0, SIZES[0]), slice(SIZES[0], None), slice(None)][rank]
    return x[rows], mask[rows]


def step(model: nn.Module, inner: nn.Module, rank: int, world: int) -> tuple[float, Tensor]:
    """Run one step; the task loss is a sum over real tokens, divided by all ranks' tokens."""
    x, mask = rank_batch(rank)
    squares = (model(x, mask).square().sum(-1) * mask).sum()
    loss = furina.auxiliary_loss(inner)
    (world * squares / rank_batch(2)[1].sum() + 10 * loss).backward()
    grads = [p.grad.flatten() for p in furina.adapter_parameters(inner).values()]
    return loss.item(), torch.cat(grads)


def worker(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        model = chain(small("furina", num_experts=EXPERTS))
        perturb(model)
        model.train()
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.save(step(wrapped, model, rank, 2), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_ranks_equal_one_process_with_both_batches(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = chain(small("furina", num_experts=EXPERTS))
    perturb(model)
    loss, gradient = step(model.train(), model, 2, 1)
    for rank_loss, rank_gradient in ranks:
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(rank_gradient, gradient, rtol=1e-9, atol=1e-11)
    model.zero_grad()
    alone = step(model, model, 0, 1)
    assert alone[0] != pytest.approx(loss, rel=1e-3), "one rank alone must differ"
