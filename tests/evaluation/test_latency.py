from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import furina
from furina.backbones.load import load_backbone
from furina.errors import ConfigurationError
from furina.evaluation.latency import adapter_variants, generate, measure_latency
from furina.records import Latency
from tests.helpers import contiguity_at_the_head


class Clock:
    """Stands still until something takes time."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Stand:
    """A tiny model whose forwards take the time that the variant at work says."""

    def __init__(self) -> None:
        self.model = load_backbone("tiny-llama", dtype="float32")
        self.clock = Clock()
        self.log: list[str] = []
        self.shapes: list[torch.Size] = []
        self.prompts: list[tuple[str, tuple[int, ...]]] = []
        self.slowdown = 1.0
        self.model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, model, args, kwargs) -> None:
        ids = kwargs["input_ids"]
        assert kwargs["logits_to_keep"] == 1 and kwargs["use_cache"]
        assert not model.training and torch.is_inference_mode_enabled()
        prefill = ids.shape[1] > 1
        if prefill:
            self.prompts.append((self.log[-1], tuple(ids[0].tolist())))
        self.shapes.append(ids.shape)
        self.clock.now += self.slowdown * (self.prefill if prefill else self.decode)

    def variant(self, name: str, prefill: float, decode: float, wiring: float = 1000.0):
        @contextmanager
        def enter() -> Iterator[None]:
            self.log.append(name)
            self.clock.now += wiring  # must never be counted
            self.prefill, self.decode = prefill, decode
            yield
            self.clock.now += wiring

        return enter


@pytest.fixture
def stand() -> Stand:
    return Stand()


def measure(stand: Stand, variants, **options):
    options = {"prompt_tokens": 7, "new_tokens": 4, "rounds": 3, "warmup": 0} | options
    return measure_latency(stand.model, variants, clock=stand.clock, **options)


def test_times_are_split_into_first_later_and_all_tokens(stand):
    (result,) = measure(stand, {"base": stand.variant("base", prefill=0.5, decode=0.02)})
    assert result.ttft_ms.median == pytest.approx(500)
    assert result.per_token_ms.median == pytest.approx(20)
    assert result.total_ms.median == pytest.approx(500 + 3 * 20)
    assert (result.prompt_tokens, result.new_tokens, result.total_ms.n) == (7, 4, 3)
    assert len(result.rounds) == 3


def test_the_prompt_is_read_once_and_then_one_token_at_a_time(stand):
    measure(stand, {"base": stand.variant("base", 1, 1)}, rounds=1)
    assert stand.shapes == [(1, 7), (1, 1), (1, 1), (1, 1)]


def test_a_batch_takes_its_rows_together_and_counts_all_their_tokens(stand):
    (result,) = measure(stand, {"base": stand.variant("base", 0.5, 0.1)}, batch_size=3)
    assert {tuple(shape) for shape in stand.shapes} == {(3, 7), (3, 1)}
    assert result.total_ms.median == pytest.approx(500 + 3 * 100)
    assert result.tokens_per_second == pytest.approx(3 * 4 / 0.8)


def test_median_and_quartiles_are_over_rounds(stand):
    slow = iter([1, 2, 3, 4, 50])
    base = stand.variant("base", 0.1, 0.1)

    def enter():
        stand.slowdown = next(slow)
        return base()

    (result,) = measure(stand, {"base": enter}, rounds=5)
    spread = result.ttft_ms
    assert (spread.q1, spread.median, spread.q3) == pytest.approx((200, 300, 400))
    assert spread.n == 5


def test_a_slow_round_does_not_move_the_ratio_to_base(stand):
    def machine(*_) -> None:  # each round is slower than the one before
        stand.slowdown = 1 + 7 * ((len(stand.log) - 1) // 2)

    stand.model.register_forward_pre_hook(machine, prepend=True)
    base, slow = measure(
        stand,
        {"base": stand.variant("base", 0.1, 0.01), "slow": stand.variant("slow", 0.3, 0.02)},
        rounds=4,
    )
    assert slow.ttft_ms.q3 > 2 * slow.ttft_ms.q1
    for name, ratio in {"ttft_ms": 3, "per_token_ms": 2, "total_ms": 36 / 13}.items():
        assert base.ratio_to_base[name].q1 == base.ratio_to_base[name].q3 == 1
        spread = slow.ratio_to_base[name]
        assert (spread.q1, spread.median, spread.q3) == pytest.approx((ratio,) * 3)


def test_warm_up_rounds_are_run_and_not_counted(stand):
    calls: list[int] = []
    base = stand.variant("base", 0.1, 0.01)

    def enter():
        calls.append(1)
        stand.slowdown = 100.0 if len(calls) <= 2 else 1.0
        return base()

    (result,) = measure(stand, {"base": enter}, warmup=2, rounds=3)
    assert len(calls) == 5
    assert [timing.ttft_ms for timing in result.rounds] == pytest.approx([100] * 3)


def test_variants_are_interleaved_in_a_seeded_random_order(stand):
    names = ["base", "unmerged", "merged"]

    def order(seed: int) -> list[tuple[str, ...]]:
        stand.log.clear()
        variants = {name: stand.variant(name, 1, 1) for name in names}
        measure(stand, variants, rounds=12, seed=seed, new_tokens=2)
        return [tuple(stand.log[i : i + 3]) for i in range(0, 36, 3)]

    first = order(0)
    assert all(sorted(each) == sorted(names) for each in first)
    assert len(set(first)) > 1
    assert order(0) == first != order(1)


def test_all_variants_read_the_same_prompt_new_in_each_round(stand):
    measure(stand, {name: stand.variant(name, 1, 1) for name in ("base", "merged")}, rounds=3)
    rounds = [{ids for _, ids in stand.prompts[i : i + 2]} for i in range(0, 6, 2)]
    assert [len(prompts) for prompts in rounds] == [1, 1, 1]
    assert len(set.union(*rounds)) == 3


def test_without_a_base_there_is_no_ratio(stand):
    (result,) = measure(stand, {"merged": stand.variant("merged", 1, 1)})
    assert result.ratio_to_base == {}


def test_the_models_modes_and_the_global_generator_are_left_alone(stand):
    stand.model.train()
    stand.model.model.layers[0].eval()
    state = torch.get_rng_state()
    measure(stand, {"base": stand.variant("base", 1, 1)})
    assert stand.model.training and not stand.model.model.layers[0].training
    assert torch.equal(torch.get_rng_state(), state)


def test_decoding_is_greedy_generation_without_an_early_stop():
    model = load_backbone("tiny-llama", dtype="float32")
    prompt = torch.arange(5, 17).reshape(1, -1)
    with torch.inference_mode():
        tokens, _ = generate(model, prompt, 20, Clock())
        model.generation_config.eos_token_id = None
        expected = model.generate(prompt, do_sample=False, max_new_tokens=20)
        model.config.eos_token_id = model.generation_config.eos_token_id = int(tokens[0, 0])
        again, _ = generate(model, prompt, 20, Clock())
        stopped = model.generate(prompt, do_sample=False, max_new_tokens=20)
        static, _ = generate(model, prompt, 20, Clock(), static_cache=True)
    assert torch.equal(tokens, expected[:, prompt.shape[1] :])
    assert torch.equal(static, tokens)
    assert torch.equal(again, tokens)
    assert stopped.shape[1] == prompt.shape[1] + 1


def test_a_frozen_head_is_not_multiplied_row_by_row():
    model = load_backbone("tiny-llama", dtype="float32").requires_grad_(False)
    prompt = torch.arange(5, 17).reshape(3, -1)
    with torch.inference_mode(), contiguity_at_the_head(model) as whole:
        model(prompt, logits_to_keep=1)
        assert whole == [False]  # what `generate` is to change
        generate(model, prompt, 2, Clock())
        assert whole[1:] == [True, True]
        assert len(model.lm_head._forward_pre_hooks) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_tokens": 0},
        {"new_tokens": 1},
        {"rounds": 0},
        {"warmup": -1},
        {"new_tokens": 9999},
        {"batch_size": 0},
    ],
)
def test_impossible_lengths_are_one_sentence(stand, options):
    with pytest.raises(ConfigurationError):
        measure(stand, {"base": stand.variant("base", 1, 1)}, **options)


def adapted(method: str, **options):
    model = load_backbone("tiny-llama", dtype="float32")
    furina.adapt(model, method, rank=4, seed=0, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in furina.adapter_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25).reshape(1, -1)).logits


@pytest.mark.parametrize("method", ["lora", "furina"])
def test_the_wirings_are_the_base_the_adapted_and_the_merged_model(method):
    model, plain = adapted(method), logits(load_backbone("tiny-llama", dtype="float32"))
    unmerged = logits(model)
    furina.merge(model)
    merged = logits(model)
    furina.unmerge(model)
    variants = adapter_variants(model)
    found = {}
    for name, enter in variants.items():
        with enter():
            found[name] = logits(model)
    assert torch.equal(found["base"], plain)
    assert torch.equal(found["unmerged"], unmerged)
    assert torch.equal(found["merged"], merged)
    assert not torch.equal(merged, plain)
    assert torch.equal(logits(model), unmerged)


def test_merged_and_base_have_the_plain_backbones_modules():
    model = adapted("furina")
    plain = {name: type(module) for name, module in load_backbone("tiny-llama").named_modules()}
    variants = adapter_variants(model)
    for name in ("base", "merged"):
        with variants[name]():
            assert {key: type(module) for key, module in model.named_modules()} == plain


def test_the_wiring_comes_back_after_an_error():
    model = adapted("furina")
    before = logits(model)
    with pytest.raises(KeyError), adapter_variants(model)["merged"]():
        raise KeyError
    assert torch.equal(logits(model), before)


def test_the_wirings_cost_one_copy_of_the_adapted_weights():
    model = adapted("furina")
    own = {p.data_ptr() for p in model.parameters()}
    extra = 0
    for enter in adapter_variants(model).values():
        with enter():
            extra += sum(p.numel() for p in model.parameters() if p.data_ptr() not in own)
    state = furina.model.state.state_of(model)
    assert extra == sum(layer.base.weight.numel() for layer in state.layers.values())


def test_a_model_without_an_adapter_is_its_own_base():
    model = load_backbone("tiny-llama", dtype="float32")
    assert list(adapter_variants(model)) == ["base"]


def test_a_merged_model_must_be_unmerged_first():
    model = adapted("lora")
    furina.merge(model)
    with pytest.raises(ConfigurationError, match="unmerge"):
        adapter_variants(model)


def test_an_adapted_model_is_timed_for_real_and_recorded():
    model = adapted("furina")
    results = measure_latency(model, prompt_tokens=8, new_tokens=4, rounds=2, warmup=1)
    assert [result.variant for result in results] == ["base", "unmerged", "merged"]
    for result in results:
        record = result.to_record(result.variant)
        assert isinstance(record, Latency) and record.total_ms == result.total_ms
        assert 0 < result.ttft_ms.median < result.total_ms.median
