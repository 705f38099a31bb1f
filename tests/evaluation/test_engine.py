from __future__ import annotations

import random
import warnings

import pytest
import torch

import furina
from furina.adapters import methods
from furina.errors import ConfigurationError
from furina.evaluation.engine import PATHS, Scorer
from furina.evaluation.hflm import live_model
from furina.evaluation.independence import check_causal
from furina.evaluation.packing import (
    Limits,
    Packing,
    batches,
    common_prefix,
    to_tensor,
    tree_mask,
)
from tests.helpers import BACKBONES, VOCABULARY, perturb, small, tiny_llama

WINDOW = 64
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}  # about 30 roundings of sums near 100


@pytest.fixture(autouse=True)
def every_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def score(model, requests, max_length, batch_size=None):
    model.eval()
    return Scorer(model, max_length, batch_size).score(requests)


def draw(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCABULARY) for _ in range(count)]


def mixed_requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Questions, single tokens, shared first tokens, two contexts of one answer, duplicates."""
    rng = random.Random(seed)
    requests = []
    for _ in range(6):
        context = draw(rng, rng.randrange(1, 16))
        requests += [(context, draw(rng, rng.randrange(1, 7))) for _ in range(4)]
    context, start = draw(rng, 12), draw(rng, 2)
    requests += [(context, [token]) for token in (7, 8, 7)]  # one position, read three times
    requests += [(context, start + draw(rng, n)) for n in (0, 1, 3)]  # predicted in the prefix
    sentence, ending = draw(rng, 20), draw(rng, 5)
    requests += [(sentence + draw(rng, n), ending) for n in (1, 2)]  # as WinoGrande
    requests += [(draw(rng, 60), draw(rng, 9)), (draw(rng, 64), draw(rng, 1))]  # too long, and not
    return [*requests, requests[0]]


def one_at_a_time(model, requests) -> list[tuple[float, bool]]:
    """Every sequence alone, with all of its logits."""
    answers = []
    for context, continuation in requests:
        ids, wanted = (context + continuation)[-(WINDOW + 1) :], torch.tensor(continuation)
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0, -len(wanted) :].double()
        values = logits.log_softmax(-1).gather(1, wanted[:, None])
        answers.append((values.sum().item(), torch.equal(logits.argmax(-1), wanted)))
    return answers


def assert_equal(found, expected, tolerance) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    values = [value for value, _ in expected]
    assert [value for value, _ in found] == pytest.approx(values, abs=tolerance, rel=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_scores_are_those_of_one_sequence_at_a_time(backbone, dtype):
    model, requests = BACKBONES[backbone](dtype), mixed_requests()
    expected = one_at_a_time(model, requests)
    for batch_size in (1, 3, None):
        found = score(model, requests, max_length=WINDOW, batch_size=batch_size)
        assert_equal(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("method", methods())
def test_adapted_models_score_the_same_packed_and_plain(method):
    model = furina.adapt(tiny_llama(torch.float64), small(method), seed=0)
    perturb(model)
    packed = Scorer(model.eval(), WINDOW)
    assert packed.packing is not PATHS
    plain = Scorer(model, WINDOW)
    plain.packing = PATHS
    requests = mixed_requests()
    assert_equal(packed.score(requests), plain.score(requests), 1e-10)


def test_order_and_company_of_requests_change_nothing():
    model, requests = tiny_llama(torch.float64), mixed_requests()
    expected = dict(zip(map(str, requests), score(model, requests, max_length=WINDOW), strict=True))
    shuffled = random.Random(1).sample(requests, k=len(requests))
    for some in (shuffled, shuffled[:7], [*shuffled, *mixed_requests(seed=1)]):
        found = score(model, some, max_length=WINDOW)[: len(shuffled)]
        wanted = [expected[str(request)] for request in some[: len(shuffled)]]
        assert_equal(found, wanted, 1e-10)


def test_small_budgets_split_batches_and_change_nothing():
    model, requests = tiny_llama(torch.float64), mixed_requests()
    scorer = Scorer(model, WINDOW)
    expected = scorer.score(requests)
    scorer.budget = scorer.budget._replace(tokens=32, logits=3 * VOCABULARY, softmax=VOCABULARY)
    assert_equal(scorer.score(requests), expected, 1e-10)


def test_greedy_continuations_are_known():
    model, context = tiny_llama(torch.float64), [5, 9, 11]
    greedy = model.generate(
        torch.tensor([context]), max_new_tokens=4, min_new_tokens=4, do_sample=False
    )[0, 3:].tolist()
    others = [[*greedy[:3], (greedy[3] + 1) % VOCABULARY], [greedy[0]]]
    found = score(model, [(context, ids) for ids in (greedy, *others)], max_length=WINDOW)
    logits = model(torch.tensor([context + greedy])).logits[0, 2:6]
    plainly = torch.equal(logits.argmax(-1), torch.tensor(greedy))
    assert [flag for _, flag in found] == [plainly, False, logits[0].argmax().item() == greedy[0]]


def count_tokens(model) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    return shapes


def test_what_requests_share_is_computed_once_and_only_predictions_reach_lm_head():
    model = tiny_llama()
    scorer = Scorer(model, WINDOW)
    shapes = count_tokens(model)
    heads: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda _, args, output: heads.append(output.shape))
    context = list(range(3, 23))
    answers = [[30, 31, 32], [30, 33], [34, 35], [36], [36]]
    scorer.score([(context, answer) for answer in answers])
    # The tokens read are the context, 30 31 (30 once, its other continuation is predicted), 34.
    assert shapes == [(1, 20 + 2 + 1)]
    assert heads == [(1, 1 + 2 + 1, VOCABULARY)]


@pytest.mark.parametrize(
    "limits", [Limits(64, 999, 99), Limits(999, 999, 99, 3), Limits(999, 999, 5), Limits(999, 7, 9)]
)
def test_batches_keep_to_their_limits(limits):
    sequences = [tuple(range(n, 3 * n)) for n in range(3, 20)]
    rows = Packing(price=0, longest=0).rows(sequences)
    found = list(batches(rows, [1] * len(sequences), limits))
    assert sorted(id(row) for batch in found for row in batch) == sorted(map(id, rows))
    for batch in found:
        width, tokens = len(batch[0]), sum(map(len, batch))
        assert len(batch) * width <= limits.tokens and len(batch) * width - tokens <= limits.padding
        assert len(batch) <= min(limits.reads, limits.rows or 99)
    assert 1 < len(found) < len(rows)
    lengths = [len(row) for batch in found for row in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_a_node_sees_itself_and_its_ancestors():
    sequences = [(1, 2, 3), (1, 2, 4, 5), (1, 6)]
    (row,) = Packing(price=100, longest=100).rows(sequences)
    _, depths, ends = to_tensor([row, *Packing(0, 0).rows([(7, 8, 9, 10, 11, 12, 13)])])
    assert row.tokens == [1, 2, 3, 4, 5, 6] and depths[0].tolist() == [0, 1, 2, 2, 3, 1, 0]
    mask = tree_mask(ends, torch.float32)
    assert mask.shape == (2, 1, 7, 7)
    seen = [[k for k in range(7) if mask[0, 0, q, k] == 0] for q in range(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 5], [6]]
    assert torch.equal(mask[1, 0] == 0, torch.ones(7, 7).tril().bool())
    paths = [[row.tokens[node] for node in path] for path in row.paths]
    assert [paths[row.members.index(m)] for m in range(3)] == [list(ids) for ids in sequences]


def test_sequences_that_share_too_little_stay_apart():
    long = [tuple([1, *range(n, n + 50)]) for n in (2, 60, 120)]
    assert len(Packing(price=48, longest=2048).rows(long)) == 3
    assert len(Packing(price=10**6, longest=2048).rows(long)) == 1
    assert len(Packing(price=10**6, longest=101).rows(long)) == 2
    assert common_prefix((1, 2, 3), (1, 2)) == 2 and common_prefix((), (1,)) == 0


def deafen(model, drop: str) -> None:
    """Make a model ignore an argument."""
    inner = model.forward
    model.forward = lambda **kwargs: inner(**{k: v for k, v in kwargs.items() if k != drop})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("drop", ["position_ids", "attention_mask"])
def test_a_model_that_ignores_the_tree_falls_back_with_a_warning(drop, dtype):
    model, requests = tiny_llama(dtype), mixed_requests()
    expected = one_at_a_time(model, requests)
    deafen(model, drop)
    with pytest.warns(UserWarning, match="a row of its own.*log-probabilities differ"):
        scorer = Scorer(model, WINDOW)
    if dtype == torch.float32:
        assert_equal(scorer.score(requests), expected, TOLERANCE[dtype])


def test_a_model_that_refuses_the_tree_falls_back_with_a_warning():
    model = tiny_llama(torch.float64)
    inner = model.forward
    model.forward = lambda input_ids, use_cache=True: inner(input_ids, use_cache=use_cache)
    with pytest.warns(UserWarning, match=r"takes no tree of tokens \(TypeError\)"):
        scorer = Scorer(model, WINDOW)
    assert_equal(scorer.score(mixed_requests()), one_at_a_time(model, mixed_requests()), 1e-10)


def test_alibi_and_recurrent_models_fall_back_and_score_right():
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    bloom = BloomConfig(vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=4)
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, state_size=4)
    for kind, config in ((BloomForCausalLM, bloom), (MambaForCausalLM, mamba)):
        config.initializer_range = 0.5
        model = kind(config).double().eval()
        with pytest.warns(UserWarning, match="a row of its own"):
            scorer = Scorer(model, WINDOW)
        expected = one_at_a_time(model, mixed_requests())
        assert_equal(scorer.score(mixed_requests()), expected, 1e-4)  # both have parts in fp32


def test_prompts_beyond_a_sliding_window_stay_plain_with_a_warning():
    from transformers import MistralConfig, MistralForCausalLM

    config = tiny_llama().config
    own = {key: getattr(config, key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = MistralConfig(**own, **heads, sliding_window=16, initializer_range=0.2)
    model = MistralForCausalLM(config).double().eval()
    requests = mixed_requests()
    scorer = Scorer(model, WINDOW)
    assert scorer.packing.longest == 16
    with pytest.warns(UserWarning, match="attention window of 16 tokens"):
        found = scorer.score(requests)
    assert_equal(found, one_at_a_time(model, requests), 1e-10)


def test_flash_attention_is_not_given_a_tree():
    model = tiny_llama()
    check_causal(model)  # without a device for that attention
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.warns(UserWarning, match="flash_attention_2"):
        assert Scorer(model, WINDOW).packing == PATHS


def test_nothing_to_score_is_one_sentence():
    model = tiny_llama()
    assert score(model, [], max_length=WINDOW) == []
    for request in (([], [3]), ([3], []), ([3], [4] * (WINDOW + 1))):
        with pytest.raises(ConfigurationError, match="cannot be scored"):
            score(model, [request], max_length=WINDOW)


def scored_by(model, tokenizer, engine, requests, batch_size=4):
    with live_model(model, tokenizer, batch_size, engine) as lm:
        named = [((str(a), str(b)), a, b) for a, b in requests]
        return type(lm).__name__, lm._loglikelihood_tokens(named, disable_tqdm=True)


def test_shared_prefix_lm_is_hflm_request_by_request(tokenizer):
    model, requests = tiny_llama(), mixed_requests()
    name, theirs = scored_by(model, tokenizer, "lm_eval", requests)
    assert name == "FittedLM"
    name, ours = scored_by(model, tokenizer, "shared", requests)
    assert name == "SharedPrefixLM"
    assert_equal(ours, theirs, 1e-4)


def test_rolling_texts_and_lm_evals_cache_still_work(model, tokenizer):
    from lm_eval.api.instance import Instance

    texts = ["A shadow is longest at dawn. " * 40, "Bees make honey."]
    rolled, cached = [], []
    for engine in ("lm_eval", "shared"):
        with live_model(model, tokenizer, 2, engine) as lm:
            lm._max_length = 32
            requests = [
                Instance("loglikelihood_rolling", {}, (text,), index)
                for index, text in enumerate(texts)
            ]
            rolled.append(lm.loglikelihood_rolling(requests, disable_tqdm=True))
            lm.cache_hook.add_partial = lambda *entry: cached.append(entry)
            lm._loglikelihood_tokens([(("a", "b"), [3, 4], [5]), (None, [3], [4])])
    assert rolled[1] == pytest.approx(rolled[0], rel=1e-5)
    assert [entry[:2] for entry in cached] == [("loglikelihood", ("a", "b"))] * 2


def test_an_unknown_engine_suggests_the_nearest(model, tokenizer):
    with (
        pytest.raises(ConfigurationError, match="Did you mean 'shared'"),
        live_model(model, tokenizer, 4, "shard"),
    ):
        pass
