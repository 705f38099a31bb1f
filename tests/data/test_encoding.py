"""Prompts are tokenised as lm-eval tokenises them."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furina.assets import is_cached
from furina.backbones.load import load_backbone, load_tokenizer
from furina.backbones.tiny import tiny_tokenizer
from furina.data.encoding import encode_pair
from furina.errors import ConfigurationError

MODEL = "smollm2-135m-instruct"
PAIRS = [
    ("Question: Where does °C = 0?\nAnswer:", " at sea"),
    ("Which? (A) on ice (B) in fire\nAnswer:", " B"),
]


def test_an_empty_context_is_refused(tokenizer):
    with pytest.raises(ConfigurationError, match="context is empty"):
        encode_pair(tokenizer, "", " a")


def _harness(tokenizer, model=None):
    from lm_eval.models.huggingface import HFLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model or load_backbone("tiny-llama", "float32")
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


TOKENIZERS = {
    "no bos": lambda: tiny_tokenizer(has_bos=False),
    "bos not added": tiny_tokenizer,
    "bos added": lambda: tiny_tokenizer(adds_bos=True),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def harness(request):
    return _harness(TOKENIZERS[request.param]())


CASES = [
    ("Question: the end?\nAnswer:", " in the answer"),
    ("ends with spaces  ", "in"),
    ("ends in Ques", "tion"),  # a merge across the border
    ("<s>Question", " the"),  # the text brings its own BOS
    ("</s>Question", " the"),
    ("Answ", "er"),
    ("   ", "a"),
]


@pytest.mark.parametrize(("context", "continuation"), CASES)
def test_pairs_are_encoded_as_the_harness_does(harness, context, continuation):
    expected = harness._encode_pair(context, continuation)
    assert encode_pair(harness.tokenizer, context, continuation) == expected


@settings(deadline=None, max_examples=200)
@given(
    context=st.text(st.sampled_from("Questionanswer th\n <s>/é"), min_size=1, max_size=20),
    continuation=st.text(st.sampled_from("Questionanswer th\n <s>/é"), min_size=1, max_size=9),
)
def test_any_pair_is_encoded_as_the_harness_does(harness, context, continuation):
    expected = harness._encode_pair(context, continuation)
    assert encode_pair(harness.tokenizer, context, continuation) == expected


@pytest.mark.parametrize("pair", PAIRS)
def test_there_is_one_bos_if_the_tokenizer_adds_it_and_none_otherwise(pair):
    for adds_bos in (True, False):
        tokenizer = tiny_tokenizer(adds_bos=adds_bos)
        context, answer = encode_pair(tokenizer, *pair)
        assert (context + answer).count(tokenizer.bos_token_id) == int(adds_bos)
        text = tokenizer.decode(context + answer, skip_special_tokens=True)
        assert text == "".join(pair)


@pytest.mark.assets
@pytest.mark.skipif(not is_cached(MODEL), reason=f"{MODEL} is not cached: run `furina assets`")
def test_the_real_tokenizer_encodes_pairs_as_the_harness_does_and_adds_no_bos():
    harness = _harness(load_tokenizer(MODEL))
    for context, answer in PAIRS:
        pair = encode_pair(harness.tokenizer, context, answer)
        assert pair == harness._encode_pair(context, answer)
        assert harness.tokenizer.bos_token_id not in pair[0] + pair[1]
    for context, answer in CASES:
        assert encode_pair(harness.tokenizer, context, answer) == harness._encode_pair(
            context, answer
        )
