"""What a tokenizer adds to a text is read, not assumed: in training, scoring and generation."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from furina.backbones.load import load_backbone
from furina.backbones.tiny import tiny_tokenizer
from furina.data.batches import collate, encode_examples
from furina.data.encoding import Encoder, encode_pair
from furina.data.items import Question
from furina.data.protocols import Decoding, get_protocol
from furina.data.tasks import TextPrompt, get_task
from furina.errors import ConfigurationError
from furina.evaluation.evaluate import evaluate
from furina.evaluation.evaluation import Engine
from furina.evaluation.generation import generate
from furina.evaluation.hflm import live_model
from tests.evaluation.conftest import BOS, EOS, templated

ARC, TEXT, CLEAN = get_task("arc_easy"), get_protocol("text"), get_protocol("generate_clean")
ENGINES: tuple[Engine, ...] = ("shared", "lm_eval")
WORDS = ["question", "answer", ":", "?", "a", "b", "the", "is", "in", "x", "ice", "frozen"]


def sentence_pieces():
    """A BOS, and a space put before the text where it begins: as Llama-2's."""
    pieces = ["<unk>", "<s>", "</s>", "\u2581", *(chr(code) for code in range(32, 127)), "\n"]
    model = models.BPE({piece: n for n, piece in enumerate(pieces)}, [], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def word_pieces(template=None):
    vocabulary = ["[UNK]", "<s>", "</s>", *WORDS]
    model = models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")


def without_specials(pad=None):
    bare = tiny_tokenizer().backend_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=bare, pad_token=pad)


def merging(*pairs):
    """Byte-level BPE that knows no words: a merge may go across the end of the prompt."""
    letters = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = [*letters, *("".join(pair) for pair in pairs)]
    model = models.BPE({token: n for n, token in enumerate(tokens)}, list(pairs))
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


KINDS = {
    "byte-level": (tiny_tokenizer, []),
    "BOS": (lambda: tiny_tokenizer(adds_bos=True), [BOS]),
    "dummy prefix": (sentence_pieces, [BOS]),
    "word pieces": (word_pieces, []),
    "no specials": (without_specials, []),
}
APPENDING = {
    "EOS": lambda: templated("$A </s>"),
    "BOS and EOS": lambda: templated("<s> $A </s>"),
    "CLS and SEP": lambda: word_pieces("<s> $A </s>"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_in_front_is_read_and_every_answer_is_its_own_text(kind, questions):
    make, front = KINDS[kind]
    tokenizer = make()
    encoder = Encoder(tokenizer)
    assert list(encoder.prefix) == front
    for question in questions:
        prompt = TEXT.context(ARC, question)
        for answer in TEXT.answers(ARC, question):
            context, continuation, is_split = encoder.scored(prompt, answer)
            assert is_split and context == encoder.encode(prompt) == tokenizer.encode(prompt)
            assert context + continuation == tokenizer.encode(prompt + answer)
            assert encoder.trained(prompt, answer) == encoder.pair(prompt, answer)
            assert context[: len(front)] == front and BOS not in context[len(front) :]


@pytest.mark.parametrize("make", APPENDING.values(), ids=APPENDING)
def test_a_tokenizer_that_ends_every_text_is_refused_wherever_texts_are_encoded(
    make, model, questions
):
    tokenizer = make()
    with pytest.raises(ConfigurationError, match=r"appends EOS to a prompt \(</s>\)"):
        encode_pair(tokenizer, "Answer:", " three")
    for protocol in (TEXT, CLEAN):
        with pytest.raises(ConfigurationError, match="appends EOS"):
            encode_examples(tokenizer, ARC, questions, protocol, 512)
    for protocol in ("text", "label", "lm_eval", "generate_clean"):
        with pytest.raises(ConfigurationError, match="appends EOS"):
            evaluate(model, tokenizer, "arc_easy", questions, protocol)


def test_a_tokenizer_with_two_bos_is_refused_in_training_too(questions):
    with pytest.raises(ConfigurationError, match="two BOS"):
        encode_examples(templated("<s> <s> $A"), ARC, questions, TEXT, 512)


def test_the_texts_own_bos_is_not_doubled(model):
    tokenizer = tiny_tokenizer(adds_bos=True)
    chat = "<s>Question: is ice cold?\nAnswer:"
    context, answer = encode_pair(tokenizer, chat, " yes")
    assert context.count(BOS) == 1 and BOS not in answer
    assert list(generate(model, tokenizer, [chat], Decoding(2), 1).prompt_ids) == context


def test_rows_that_are_cut_keep_their_bos_in_training(questions):
    for tokenizer, front in ((tiny_tokenizer(adds_bos=True), [BOS]), (tiny_tokenizer(), [])):
        whole = encode_examples(tokenizer, ARC, questions, TEXT, 512)
        with pytest.warns(UserWarning, match="lost the start of their context"):
            cut = encode_examples(tokenizer, ARC, questions, TEXT, 40)
        assert [row for row in cut if len(row.input_ids) == 40]
        for before, after in zip(whole, cut, strict=True):
            assert list(after.input_ids[: len(front)]) == front
            size = len(after.input_ids) - len(front)
            assert after.input_ids[len(front) :] == before.input_ids[-size:]
            assert after.answer_length == before.answer_length


def test_the_longest_answer_leaves_room_for_nothing_but_a_bos(questions):
    tokenizer = tiny_tokenizer(adds_bos=True)
    longest = max(row.answer_length for row in encode_examples(tokenizer, ARC, questions, TEXT, 99))
    with pytest.warns(UserWarning, match="lost the start"):
        rows = encode_examples(tokenizer, ARC, questions, TEXT, longest + 1)
    row = max(rows, key=lambda row: row.answer_length)
    assert row.input_ids[0] == BOS and len(row.input_ids) == row.answer_length + 1 == longest + 1


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_that_are_cut_keep_their_bos_in_scoring(engine, model, questions):
    tokenizer, window = tiny_tokenizer(adds_bos=True), 40
    encoder = Encoder(tokenizer)
    model.config.max_position_embeddings = window
    with pytest.warns(UserWarning, match="beginnings were cut"):
        found = evaluate(model, tokenizer, "arc_easy", questions, batch_size=3, engine=engine)
    cut = 0
    for question, sample in zip(questions, found.samples, strict=True):
        for answer, value in zip(TEXT.answers(ARC, question), sample.loglikelihoods, strict=True):
            context, target, _ = encoder.pair(TEXT.context(ARC, question), answer)
            ids, cut = context + target, cut + (len(context) + len(target) > window + 1)
            if len(ids) > window + 1:
                ids = [BOS, *ids[-window:]]
            with torch.no_grad():
                logits = model(torch.tensor([ids[:-1]])).logits[0, -len(target) :]
            at = logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])
            assert value == pytest.approx(at.sum().item(), abs=1e-3)
    assert cut == found.truncated > 0


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_tokenizer_without_bos_and_eos_scores_or_says_what_it_lacks(
    engine, pad, model, questions
):
    bare, usual = without_specials(pad), tiny_tokenizer()
    with pytest.raises(ConfigurationError, match=r"set tokenizer\.eos_token"):
        encode_examples(bare, ARC, questions, CLEAN, 512)
    assert encode_examples(bare, ARC, questions, TEXT, 512) == encode_examples(
        usual, ARC, questions, TEXT, 512
    )
    for protocol in ("text", "lm_eval"):
        if pad is None:
            with pytest.raises(ConfigurationError, match="give it a pad_token"):
                evaluate(model, bare, "arc_easy", questions, protocol, engine=engine)
        else:
            found = evaluate(model, bare, "arc_easy", questions, protocol, engine=engine)
            expected = evaluate(model, usual, "arc_easy", questions, protocol, engine=engine)
            assert found.samples == expected.samples
            assert bare.eos_token is None


def test_the_end_of_an_answer_is_trained_though_it_is_the_padding(questions):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = encode_examples(tokenizer, ARC, questions, CLEAN, 512)
    batch = collate(rows, tokenizer.pad_token_id)
    ends = batch["attention_mask"].sum(1) - 1
    assert batch["labels"].gather(1, ends[:, None]).eq(EOS).all()
    assert batch["labels"].eq(EOS).sum() == len(rows)


def test_tokens_beyond_the_embeddings_are_named_before_the_model_sees_them(model, questions):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(model.config.vocab_size)])
    question = questions[0]
    spoilt = [type(question)("x", "What is <extra383>?", ("a", "b"), 0), *questions]
    for protocol in ("text", "lm_eval", "generate_clean"):
        for engine in ENGINES:
            with pytest.raises(ConfigurationError, match=r"token '<extra383>' is number \d+"):
                evaluate(model, tokenizer, "arc_easy", spoilt, protocol, engine=engine)
        assert evaluate(model, tokenizer, "arc_easy", questions, protocol).samples
    tokenizer.pad_token = "<extra383>"
    with pytest.raises(ConfigurationError, match="token '<extra383>'"):
        generate(model, tokenizer, ["a", "b c"], Decoding(2), 2)


def test_an_answer_that_merges_with_its_prompt_is_trained_whole_and_never_scored(model, questions):
    tokenizer = merging((":", "\u010a"), (":", "\u0120"))
    code, task = get_protocol("code"), get_task("humaneval")
    item = task.files["train"].parse({"instruction": "Add.", "input": "", "output": "a + b"})
    (row,) = encode_examples(tokenizer, task, [item], code, 512)
    assert tokenizer.decode(row.input_ids) == f"{code.context(task, item)}\na + b</s>"
    prompt = tokenizer.encode(code.context(task, item))
    assert list(row.input_ids[: len(prompt)]) == prompt  # what generation goes on from
    assert tokenizer.decode(row.input_ids[-row.answer_length :]) == "\na + b</s>"
    for engine in ENGINES:
        with pytest.raises(ConfigurationError, match="does not part the answer ' a brick'"):
            evaluate(model, tokenizer, "arc_easy", questions, engine=engine)


def test_an_answer_without_a_token_is_refused_in_training():
    bare = without_specials("<pad>")
    bare.backend_tokenizer.normalizer = normalizers.Replace("\u2603", "")
    question = Question("snow", "What?", ("\u2603", "b"), 0)
    assert encode_pair(bare, "Question: What?\nAnswer:", "\u2603")[1] == []
    spoilt = dataclasses.replace(ARC, text=lambda asked: TextPrompt("Q:", asked.choices))
    with pytest.raises(ConfigurationError, match="answer of item 'snow' of arc_easy no token"):
        encode_examples(bare, spoilt, [question], TEXT, 512)


def test_nothing_is_printed_of_a_text_that_is_longer_than_the_tokenizer_expects(caplog, questions):
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_examples(tokenizer, ARC, questions, TEXT, 512)
    assert "longer than" not in caplog.text


def test_lm_eval_and_training_agree_on_every_kind_of_tokenizer(questions):
    model = load_backbone("tiny-llama", "float32")
    for make, _ in KINDS.values():
        tokenizer = make()
        tokenizer.pad_token = tokenizer.pad_token or "a"
        with live_model(model, tokenizer, 1, "lm_eval") as lm:
            for question in questions:
                pair = TEXT.pair(ARC, question)
                assert lm._encode_pair(*pair) == lm.encoder.pair(*pair)[:2]
