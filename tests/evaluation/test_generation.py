"""Generation against independent loops: batches, padding, masks, stops, ends, truncation."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig

from furina.backbones.tiny import tiny_tokenizer
from furina.data.protocols import Decoding
from furina.errors import ConfigurationError, FurinaError
from furina.evaluation.generation import Generated, generate
from furina.model.inject import adapt, remove
from tests.helpers import contiguity_at_the_head, fingerprint, perturb, small

PROMPTS = [
    "Question: what is 2 + 2?\nAnswer:",
    "a",
    "Name three colours, and say which of them a clear sky has at noon in summer.",
    "ö — ∑",
    "   spaces",
    "b c",
    "Twelve bees\n\nwent out.",
]
TEN = Decoding(max_new_tokens=10)


def greedy(model, tokenizer, ids: Sequence[int], count: int = 10, ends: Sequence[int] = (2,)):
    """Return the ids that follow, one full forward for each, without cache, mask or padding."""
    ids, new = list(ids), []
    with torch.no_grad():
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
            new.append(token)
    return new


def text_of(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def expected(model, tokenizer, prompts=PROMPTS, **options) -> tuple[str, ...]:
    return tuple(
        text_of(tokenizer, greedy(model, tokenizer, tokenizer.encode(p), **options))
        for p in prompts
    )


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """No call may make transformers or Python warn, unless the test says so."""
    logging.getLogger("transformers").propagate = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_any_batch_size_gives_what_a_loop_over_single_prompts_gives(model, tokenizer, batch_size):
    generated = generate(model, tokenizer, PROMPTS, TEN, batch_size)
    assert generated.texts == expected(model, tokenizer)
    assert len(set(generated.texts)) > 4
    assert generated.prompt_ids == tuple(tokenizer.encode(PROMPTS[0]))
    assert generated.truncated == 0


def test_a_frozen_head_is_not_multiplied_row_by_row(model, tokenizer):
    model.requires_grad_(False)
    with contiguity_at_the_head(model) as whole:
        generate(model, tokenizer, PROMPTS, TEN, batch_size=3)
    assert len(whole) >= 10 and all(whole)


def test_the_order_of_prompts_is_the_callers(model, tokenizer):
    forwards = generate(model, tokenizer, PROMPTS, TEN, 3)
    backwards = generate(model, tokenizer, PROMPTS[::-1], TEN, 3)
    assert backwards.texts == forwards.texts[::-1]
    assert generate(model, tokenizer, [], TEN, 3) == Generated((), (), 0)


@pytest.mark.parametrize("method", ["lora", "furina", "mixlora", "hydralora"])
def test_an_adapted_model_writes_with_its_adapter(model, tokenizer, method):
    plain = generate(model, tokenizer, PROMPTS, TEN, 4).texts
    adapt(model, small(method), seed=0)
    perturb(model)
    adapted = generate(model, tokenizer, PROMPTS, TEN, 4).texts
    assert adapted == expected(model, tokenizer)
    assert adapted != plain
    remove(model)
    assert generate(model, tokenizer, PROMPTS, TEN, 4).texts == plain


def test_dropout_is_off_and_modes_come_back(model, tokenizer):
    adapt(model, "lora", seed=0, dropout=0.5)
    perturb(model)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    first = generate(model, tokenizer, PROMPTS, TEN, 2).texts
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert generate(model, tokenizer, PROMPTS, TEN, 2).texts == first
    model.eval()
    assert first == expected(model, tokenizer)


def test_without_a_mask_padding_is_attended_to(model, tokenizer):
    decoding = Decoding(10, pass_mask=False, pad_id=5)
    pair = PROMPTS[:2]
    ids = [tokenizer.encode(prompt) for prompt in pair]
    padded = [5] * (len(ids[0]) - len(ids[1])) + ids[1]
    together = generate(model, tokenizer, pair, decoding, 2).texts
    assert together[1] == text_of(tokenizer, greedy(model, tokenizer, padded))
    assert together[0] == expected(model, tokenizer, pair)[0]
    assert generate(model, tokenizer, pair, decoding, 1).texts == expected(model, tokenizer, pair)
    assert together[1] != expected(model, tokenizer, pair)[1]


def test_without_a_mask_even_the_tokenizers_padding_is_attended_to(model, tokenizer):
    # transformers would infer a mask from padding tokens if none were given
    pair = PROMPTS[:2]
    ids = [tokenizer.encode(prompt) for prompt in pair]
    pad = tokenizer.pad_token_id
    padded = [pad] * (len(ids[0]) - len(ids[1])) + ids[1]
    texts = generate(model, tokenizer, pair, Decoding(10, pass_mask=False), 2).texts
    assert texts[1] == text_of(tokenizer, greedy(model, tokenizer, padded))


def test_without_a_mask_batches_are_consecutive_prompts(model, tokenizer):
    decoding = Decoding(6, pass_mask=False, pad_id=5)
    whole = generate(model, tokenizer, PROMPTS, decoding, 2).texts
    parts = [
        generate(model, tokenizer, PROMPTS[i : i + 2], decoding, 2).texts for i in (0, 2, 4, 6)
    ]
    assert whole == tuple(text for part in parts for text in part)


def test_with_a_mask_the_padding_token_does_not_matter(model, tokenizer):
    texts = generate(model, tokenizer, PROMPTS, TEN, 7).texts
    assert generate(model, tokenizer, PROMPTS, Decoding(10, pad_id=77), 7).texts == texts


@pytest.mark.parametrize("place", ["tokenizer", "config", "list"])
def test_writing_ends_at_any_end_of_text(model, tokenizer, place):
    ids = greedy(model, tokenizer, tokenizer.encode(PROMPTS[0]))
    place = next(i for i, token in enumerate(ids) if i > 1 and token not in ids[:i])
    end = ids[place]
    if place == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    else:
        model.generation_config.eos_token_id = end if place == "config" else [3, end]
    # a padding of an ordinary token must not be taken for text
    decoding = Decoding(10, pad_id=77)
    texts = generate(model, tokenizer, PROMPTS, decoding, 7).texts
    # decoded here with what are special tokens now
    assert texts == expected(model, tokenizer, ends=(2, 3, end) if place == "list" else (2, end))
    assert texts[0] == text_of(tokenizer, ids[:place])
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    generate(model, tokenizer, PROMPTS[:1], decoding, 1)
    assert len(forwards) == place + 1


def pairs(text: str) -> list[str]:
    """Return its pairs of ASCII characters in order; another may be half of one yet to come."""
    return list(dict.fromkeys(a + b for a, b in pairwise(text) if (a + b).isascii()))


def test_an_answer_is_cut_at_its_earliest_stop(model, tokenizer):
    full = generate(model, tokenizer, PROMPTS, Decoding(30), 3).texts
    text = full[0]
    early, late = pairs(text)[1], pairs(text)[-1]
    decoding = Decoding(30, stop=(late, early))
    cut = generate(model, tokenizer, PROMPTS, decoding, 3).texts
    assert cut == tuple(min((t.split(s)[0] for s in (late, early)), key=len) for t in full)
    assert len(cut[0]) == text.index(early) < text.index(late)


def test_a_stop_ends_the_batch_early(model, tokenizer):
    text = generate(model, tokenizer, PROMPTS[:1], Decoding(30), 1).texts[0]
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    generate(model, tokenizer, PROMPTS[:1], Decoding(30, stop=(text[3:5],)), 1)
    handle.remove()
    assert len(forwards) < 15


def test_rows_that_have_ended_are_left_out(model, tokenizer):
    full = generate(model, tokenizer, PROMPTS, Decoding(30), 7).texts
    decoding = Decoding(30, stop=tuple(pair for text in full for pair in pairs(text)[:1]))
    lengths = [len(generate(model, tokenizer, [p], decoding, 1).texts[0]) for p in PROMPTS]
    assert min(lengths) < 6 and max(lengths) > 20  # one goes on long after half have ended
    rows = []
    handle = model.register_forward_hook(lambda *given: rows.append(len(given[2].logits)))
    whole = generate(model, tokenizer, PROMPTS, decoding, 7).texts
    handle.remove()
    assert rows[0] == 7 and rows == sorted(rows, reverse=True)
    assert rows[12] <= 3
    assert whole == tuple(min((t.split(s)[0] for s in decoding.stop), key=len) for t in full)


def test_a_stop_in_the_prompt_stops_nothing(model, tokenizer):
    decoding = Decoding(10, stop=("Question:", "2 + 2"))
    assert generate(model, tokenizer, PROMPTS, decoding, 3).texts == expected(model, tokenizer)


def test_beam_search_is_deterministic_and_independent_of_the_batch(model, tokenizer):
    beams = Decoding(8, num_beams=4)
    texts = generate(model, tokenizer, PROMPTS, beams, 1).texts
    assert generate(model, tokenizer, PROMPTS, beams, 1).texts == texts
    assert generate(model, tokenizer, PROMPTS, beams, 7).texts == texts
    assert texts != generate(model, tokenizer, PROMPTS, Decoding(8), 1).texts


def test_beam_search_finds_the_likeliest_of_all_pairs(model, tokenizer):
    ids = tokenizer.encode("b c")
    with torch.no_grad():
        first = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        rows = torch.tensor([[*ids, token] for token in range(len(first))])
        second = model(input_ids=rows).logits[:, -1].log_softmax(-1)
    scores = first[:, None] + second
    scores[2] = -torch.inf  # an end of text would be compared by its mean
    scores[:, 2] = -torch.inf
    best = divmod(int(scores.argmax()), scores.shape[1])
    all_beams = Decoding(2, num_beams=len(first))
    assert generate(model, tokenizer, ["b c"], all_beams, 1).texts[0] == text_of(tokenizer, best)


def test_stops_and_beams_together(model, tokenizer):
    beams = Decoding(12, num_beams=3)
    text = generate(model, tokenizer, PROMPTS[:3], beams, 3).texts[0]
    stop = text[4:6]
    cut = generate(model, tokenizer, PROMPTS[:3], Decoding(12, (stop,), 3), 3).texts
    assert all(stop not in one for one in cut)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_prompt_that_is_too_long_loses_its_beginning_but_not_its_bos(model, adds_bos):
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    model.config.max_position_embeddings = 30
    long = "x" * 7 + "The end of it is what stays."
    ids = tokenizer.encode(long)
    kept = [1, *ids[-19:]] if adds_bos else ids[-20:]
    with pytest.warns(UserWarning, match="1 of 2 prompts leave no room for 10 new tokens"):
        generated = generate(model, tokenizer, [long, "short"], TEN, 2)
    assert generated.truncated == 1
    assert list(generated.prompt_ids) == kept
    assert generated.texts[0] == text_of(tokenizer, greedy(model, tokenizer, kept))


def test_bos_stands_once_or_not_at_all(model, tokenizer):
    adding = tiny_tokenizer(adds_bos=True)
    bare = tokenizer.encode("b c")
    assert generate(model, tokenizer, ["b c"], TEN, 1).prompt_ids == tuple(bare)
    for prompt in ("b c", "<s>b c"):
        assert generate(model, adding, [prompt], TEN, 1).prompt_ids == (1, *bare)


def test_the_models_generation_config_does_not_leak(model, tokenizer):
    plain = generate(model, tokenizer, PROMPTS, TEN, 3).texts
    config = GenerationConfig(
        do_sample=True, temperature=0.1, top_p=0.5, repetition_penalty=5.0, num_beams=3,
        suppress_tokens=list(range(100, 300)), min_new_tokens=9, max_length=3, eos_token_id=2,
    )  # fmt: skip
    model.generation_config = config
    kept = copy.deepcopy(config.to_dict())
    assert generate(model, tokenizer, PROMPTS, TEN, 3).texts == plain
    assert model.generation_config is config and config.to_dict() == kept


def test_model_and_tokenizer_are_left_as_they_were(model, tokenizer):
    before = fingerprint(model), model.config.to_dict(), tokenizer.padding_side, len(tokenizer)
    state = torch.get_rng_state()
    generate(model, tokenizer, PROMPTS, Decoding(5, ("x",), 2), 3)
    after = fingerprint(model), model.config.to_dict(), tokenizer.padding_side, len(tokenizer)
    assert after == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_outputs_that_are_not_finite_are_an_error_and_everything_comes_back(model, tokenizer):
    config = model.generation_config
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(FurinaError, match="not finite"):
        generate(model, tokenizer, PROMPTS, TEN, 3)
    assert model.generation_config is config


def test_what_cannot_be_generated_is_refused(model, tokenizer):
    with pytest.raises(ConfigurationError, match="batch size"):
        generate(model, tokenizer, PROMPTS, TEN, 0)
    with pytest.raises(ConfigurationError, match="empty"):
        generate(model, tokenizer, [""], TEN, 1)
    with pytest.raises(ConfigurationError, match="2048 positions: max_new_tokens=2047"):
        generate(model, tokenizer, PROMPTS, Decoding(2047), 1)
    tokenizer.pad_token = None
    assert generate(model, tokenizer, PROMPTS, TEN, 7).texts == expected(model, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="pad_token"):
        generate(model, tokenizer, PROMPTS, TEN, 1)
