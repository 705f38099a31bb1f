"""Tiny random models and their tokenizer, for trying things out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TINY = ("tiny-llama", "tiny-qwen2")

_SPECIALS = ("<pad>", "<s>", "</s>")
# A few merges, so that token borders matter: " the", " a", "in", "er", " Question", "Answer".
_MERGES = [
    *(("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ġ", "a"), ("i", "n"), ("e", "r"), ("o", "n")),
    *(("Q", "u"), ("e", "s"), ("t", "i"), ("Qu", "es"), ("ti", "on"), ("Ques", "tion")),
    *(("A", "n"), ("s", "w"), ("An", "sw"), ("Answ", "er"), ("Ġ", "Ġ"), ("a", "n")),
]


def tiny_tokenizer(has_bos: bool = True, adds_bos: bool = False) -> PreTrainedTokenizerBase:
    """Build a byte-level tokenizer of a few hundred tokens: every text survives a round trip.

    Args:
        has_bos: whether a BOS token exists.
        adds_bos: whether the tokenizer puts it before every text by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*_SPECIALS, *letters, *("".join(pair) for pair in _MERGES)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>" if has_bos else None,
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=2048,
    )


def tiny_config(name: str) -> PreTrainedConfig:
    """Return a two-layer configuration with grouped queries and no two equal matrix sides."""
    from transformers import LlamaConfig, Qwen2Config

    kind, tied = (LlamaConfig, True) if name == "tiny-llama" else (Qwen2Config, False)
    config: PreTrainedConfig = kind(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.125,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1 if name == "tiny-llama" else None,
        eos_token_id=2,
    )
    return config


def tiny_model(name: str, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """Return the same random weights for every dtype and processor, rounded once."""
    import torch
    from transformers import AutoModelForCausalLM

    def build(dtype: torch.dtype) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            tiny_config(name), attn_implementation=attention, dtype=dtype
        )
        return model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exact = build(torch.float64)  # fp32 normal numbers come from a kernel of the processor's
        for parameter_name, parameter in exact.named_parameters():
            if parameter_name.endswith("bias"):  # zero at first, and a zero bias tests nothing
                torch.nn.init.normal_(parameter, std=0.1)
        # Not exact.to(dtype): it would round the rotary frequencies too, as no loader does.
        model = build(dtype)
    model.load_state_dict(exact.state_dict())
    return model
