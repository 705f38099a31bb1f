"""No row of a batch changes another: models that would are scored apart, or refused."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers

from furina.backbones.load import load_backbone
from furina.backbones.tiny import tiny_tokenizer
from furina.data.protocols import Decoding
from furina.errors import ConfigurationError
from furina.evaluation.engine import Scorer
from furina.evaluation.evaluate import evaluate
from furina.evaluation.generation import generate
from furina.evaluation.hflm import live_model
from furina.evaluation.independence import check_causal, original_length, reads_padding

ORIGINAL, WINDOW = 24, 96
SIDES = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def made(kind, config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(config).eval()


def dynamic():
    """Its frequencies grow with the longest row so far."""
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}
    config = transformers.LlamaConfig(
        **SIDES, **SPECIALS, max_position_embeddings=ORIGINAL, rope_parameters=scaling
    )
    return made("LlamaForCausalLM", config)


def longrope():
    """It has two sets of frequencies, one for batches with a long row."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "original_max_position_embeddings": ORIGINAL,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 3.0, 2.0, 5.0],
    }
    config = transformers.Phi3Config(
        **SIDES,
        **SPECIALS,
        max_position_embeddings=WINDOW,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=scaling,
    )
    return made("Phi3ForCausalLM", config)


def rwkv():
    config = transformers.RwkvConfig(
        vocab_size=384, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, **SPECIALS
    )
    model = made("RwkvForCausalLM", config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def mamba():
    sides = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return made("MambaForCausalLM", transformers.MambaConfig(**sides, initializer_range=0.5))


def xlnet():
    sides = {"vocab_size": 384, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    return made("XLNetLMHeadModel", transformers.XLNetConfig(**sides, **SPECIALS))


def bert():
    sides = {key: SIDES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
    sides |= {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.3}
    return made("BertLMHeadModel", transformers.BertConfig(**sides, is_decoder=False))


def requests():
    """Return contexts that share beginnings, on both sides of the original length."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 384, (60,), generator=generator).tolist()
    ends = (3, 8, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 30, 50)
    return [(ids[:end], [ids[-end], *ids[:2]]) for end in ends] * 2


def one_at_a_time(fresh):
    values = []
    for context, continuation in requests():
        model = fresh()  # that has seen nothing longer
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *continuation[:-1]]])).logits[0]
        at = logits[-len(continuation) :].log_softmax(-1)
        values.append(at.gather(1, torch.tensor(continuation)[:, None]).sum().item())
    return values


@pytest.mark.parametrize("fresh", [dynamic, longrope])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_a_row_beyond_the_original_length_changes_no_other_score(fresh, batch_size):
    model = fresh()
    assert original_length(model) == ORIGINAL
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in a row of its own")
        scorer = Scorer(model, WINDOW, batch_size)
    for _ in range(2):  # what was read before does not count either
        with pytest.warns(UserWarning, match=f"longer than {ORIGINAL} tokens are scored one at a"):
            found = [value for value, _ in scorer.score(requests())]
        assert found == pytest.approx(one_at_a_time(fresh), abs=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = [pair for pair in requests() if len(pair[0]) < ORIGINAL - 2]
        assert len(scorer.score(short)) == len(short)


@pytest.mark.parametrize("fresh", [dynamic, longrope])
def test_the_reference_engine_refuses_rows_that_change_each_other(fresh):
    with live_model(fresh(), tiny_tokenizer(), 4, "lm_eval") as lm:
        lm._max_length = WINDOW
        asked = [(("", ""), *pair) for pair in requests()]
        assert lm._loglikelihood_tokens(asked[:2], disable_tqdm=True)
        with pytest.raises(ConfigurationError, match="use engine 'shared'"):
            lm._loglikelihood_tokens(asked, disable_tqdm=True)


PROMPTS = ["a", "What is it?", "The answer is in the question", "x" * 40, "short one"]


@pytest.mark.parametrize("fresh", [longrope, rwkv, mamba])
def test_what_a_prompt_is_answered_does_not_depend_on_its_batch(fresh):
    tokenizer, decoding = tiny_tokenizer(), Decoding(12)
    alone = [generate(fresh(), tokenizer, [prompt], decoding, 1).texts[0] for prompt in PROMPTS]
    assert len(set(alone)) > 2
    model = fresh()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for size in (1, 2, 4, 5):
            assert list(generate(model, tokenizer, PROMPTS, decoding, size).texts) == alone
    reasons = [str(each.message) for each in said if "reads padding" in str(each.message)]
    assert len(reasons) == (3 if fresh is rwkv else 0)


@pytest.mark.parametrize("fresh", [rwkv, longrope])
def test_lm_evals_own_generation_does_not_depend_on_the_batch_either(fresh):
    from lm_eval.api.instance import Instance

    def written(size):
        with live_model(fresh(), tiny_tokenizer(), size) as lm:
            options = {"max_gen_toks": 8, "until": ["\n\n"], "do_sample": False}
            asked = [
                Instance("generate_until", {}, (prompt, options), number)
                for number, prompt in enumerate(PROMPTS)
            ]
            answers = lm.generate_until(asked, disable_tqdm=True)
            assert lm.batch_size == size
            return answers

    alone = written(1)
    with pytest.warns(UserWarning, match="one at a time"):
        assert written(4) == alone


def test_short_prompts_of_a_long_context_model_still_share_a_batch():
    model, rows = longrope(), []
    model.register_forward_hook(lambda *given: rows.append(len(given[2].logits)))
    generate(model, tiny_tokenizer(), ["a", "b c", "d"], Decoding(4), 3)
    assert rows.count(3) >= 1 and rows.count(1) <= 4


@pytest.mark.parametrize("fresh", [xlnet, bert])
def test_a_model_that_sees_later_tokens_is_neither_scored_nor_asked(fresh, questions):
    model, tokenizer = fresh(), tiny_tokenizer()
    with pytest.raises(ConfigurationError, match="is no causal language model"):
        Scorer(model, WINDOW)
    for protocol in ("text", "lm_eval", "generate_clean"):
        for engine in ("shared", "lm_eval"):
            with pytest.raises(ConfigurationError, match="is no causal language model"):
                evaluate(model, tokenizer, "arc_easy", questions, protocol, engine=engine)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_ordinary_model_is_asked_once_and_trusted_in_every_dtype(dtype):
    model, forwards = load_backbone("tiny-llama", dtype), []
    model.eval().register_forward_hook(lambda *_: forwards.append(1))
    for _ in range(3):
        check_causal(model)
        assert not reads_padding(model, 0)
    assert len(forwards) == 3  # of the causal probe, and of the prompt alone and beside another
    assert original_length(model) is None
