"""Adapting finds exactly the linears that were asked for, and removing undoes all of it."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import furina
from furina.adapters import AdapterLinear
from furina.errors import ConfigurationError
from furina.model.state import state_of
from tests.helpers import BACKBONES, Chain, chain, fingerprint, perturb, raw, small, tokens

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
every_method = pytest.mark.parametrize("method", furina.methods())


def refused(model: nn.Module, *words: str, targets: object, method: str = "lora") -> None:
    """Assert that adapting fails in one sentence holding `words`, and changes nothing."""
    before = fingerprint(model)
    with pytest.raises(ConfigurationError) as caught:
        furina.adapt(model, method, targets=targets)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert not furina.is_adapted(model)
    assert fingerprint(model) == before


@every_backbone
@pytest.mark.parametrize("target", ["q_porj", "model.layers.7.*", "Q_PROJ", "proj"])
def test_a_target_that_matches_nothing_lists_what_could(backbone: str, target: str) -> None:
    words = ("matches no module", "down_proj", "gate_proj", "k_proj", "lm_head", "up_proj")
    refused(BACKBONES[backbone](), *words, targets=["q_proj", target])


def test_default_targets_that_are_not_there_are_an_error() -> None:
    refused(Chain(), "has no q_proj", "name targets", "first, second", targets=None)
    refused(nn.Sequential(nn.ReLU()), "none of its linears can be adapted", targets=["q_proj"])


@pytest.mark.parametrize("targets", [[], (), "q_proj", [1]])
def test_targets_that_are_no_list_of_names_are_refused(targets: object) -> None:
    refused(BACKBONES["llama"](), "targets must be a list of module names", targets=targets)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("model.layers.0.*", "LlamaAttention"),
        ("*", "LlamaForCausalLM"),
        ("embed_tokens", "Embedding"),
        ("input_layernorm", "LlamaRMSNorm"),
    ],
)
def test_a_match_that_is_no_linear_is_named_with_what_could_match(target: str, kind: str) -> None:
    words = (kind, "not a plain nn.Linear", "linears that could match", "q_proj")
    refused(BACKBONES["llama"](), *words, targets=[target])


class Fused(nn.Linear):
    """A subclass, as quantised and fused linears are."""


def test_a_subclass_of_linear_is_refused() -> None:
    model = Chain()
    model.second = Fused(7, 5)
    refused(model, "second is a Fused", targets=["second"])
    refused(nn.ModuleDict({"a": nn.MultiheadAttention(4, 2)}), "not a plain", targets=["out_proj"])


def test_a_convolution_that_acts_as_a_linear_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    refused(model, "c_attn is a Conv1D", targets=["c_attn"])


def test_a_module_in_two_places_is_refused_directly_and_inside_a_block() -> None:
    twice = nn.ModuleDict({"one": nn.Linear(4, 4)})
    twice["two"] = twice["one"]
    refused(twice, "used in more than one place", targets=["one"])
    block = nn.ModuleDict({"proj": nn.Linear(4, 4)})
    refused(nn.ModuleList([block, block]), "used in more than one place", targets=["proj"])


def test_a_tied_weight_is_refused() -> None:
    model = Chain((7, 7, 7))
    model.second.weight = model.first.weight
    refused(model, "weight of first is tied", targets=["first"])
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.helpers import SIDES

    tied = LlamaForCausalLM(LlamaConfig(**SIDES, tie_word_embeddings=True))
    refused(tied, "weight of lm_head is tied", targets=["lm_head"])


def test_an_untied_head_can_be_adapted() -> None:
    model = furina.adapt(BACKBONES["llama"](), small("lora"), targets=["lm_head"])
    assert set(state_of(model).layers) == {"lm_head"}


@every_method
def test_an_adapted_model_is_refused(method: str) -> None:
    model = furina.adapt(BACKBONES["llama"](), small(method))
    before = fingerprint(model)
    for other in furina.methods():
        with pytest.raises(ConfigurationError, match=f"already has a {method} adapter"):
            furina.adapt(model, other)
    assert fingerprint(model) == before


def test_options_beside_a_config_are_refused() -> None:
    model = BACKBONES["llama"]()
    with pytest.raises(ConfigurationError, match=r"\['rank'\] would be ignored"):
        furina.adapt(model, small("lora"), rank=4)
    with pytest.raises(ConfigurationError, match="Did you mean 'rank'"):
        furina.adapt(model, "lora", rnak=4)
    with pytest.raises(ConfigurationError, match="Did you mean 'furina'"):
        furina.adapt(model, "furnia")


@every_method
def test_a_failed_adapt_leaves_the_model_alone(method: str) -> None:
    refused(BACKBONES["llama"](), "matches no module", targets=["q_proj", "nope"], method=method)


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        (["q_proj"], 2),
        (["q_proj", "q_proj", "*.q_proj"], 2),
        (["model.layers.1.self_attn.v_proj"], 1),
        (["self_attn.v_proj"], 2),
        (["model.layers.[0-1].mlp.*_proj"], 6),
        (["model.layers.0.*_proj"], 7),
        (["*.?_proj"], 8),
        (None, 14),
    ],
)
def test_names_last_parts_and_globs_select(targets: list[str] | None, count: int) -> None:
    model = furina.adapt(BACKBONES["qwen2"](), small("lora"), targets=targets)
    layers = state_of(model).layers
    assert len(layers) == count == furina.describe(model).num_linears
    wrapped = {name for name, m in model.named_modules() if isinstance(m, AdapterLinear)}
    assert wrapped == set(layers)
    assert {name for name in furina.adapter_parameters(model)} == {
        f"{name}.{leaf}" for name in layers for leaf in ("lora_A", "lora_B")
    }


ARCHITECTURES = {
    "MistralConfig": ["q_proj", "down_proj"],
    "GemmaConfig": ["q_proj", "down_proj"],
    "Phi3Config": ["qkv_proj", "down_proj"],
    "GPTNeoXConfig": ["query_key_value", "dense_4h_to_h"],
    "OPTConfig": ["q_proj", "fc2"],
    "Olmo2Config": ["q_proj", "down_proj"],
    "Qwen3Config": ["q_proj", "down_proj"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_work_alike(name: str) -> None:
    import transformers

    sides = {
        "vocab_size": 48,
        "hidden_size": 24,
        "intermediate_size": 40,
        "ffn_dim": 40,
        "word_embed_proj_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sides)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    batch = tokens()
    with torch.no_grad():
        plain = model(**batch).logits
        furina.adapt(model, small("furina"), targets=ARCHITECTURES[name], seed=0)
        assert torch.equal(model(**batch).logits, plain)
        perturb(model)
        unmerged = model(**batch).logits
        furina.merge(model)
        torch.testing.assert_close(model(**batch).logits, unmerged, rtol=1e-9, atol=1e-10)
        assert (unmerged - plain).abs().max() > 1e-3
    furina.unmerge(model)
    model.train()(**batch).loss.backward()
    furina.auxiliary_loss(model)


@every_method
def test_the_backbone_is_frozen_and_only_the_adapter_trains(method: str) -> None:
    model = furina.adapt(BACKBONES["llama"](), small(method))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(furina.adapter_parameters(model))
    assert trained


@every_method
def test_the_seed_decides_the_adapter_and_nothing_else_does(method: str) -> None:
    def built(seed: int, outside: int) -> dict[str, bytes]:
        torch.manual_seed(outside)
        model = furina.adapt(BACKBONES["llama"](), small(method), seed=seed)
        return {name: raw(tensor) for name, tensor in furina.adapter_state_dict(model).items()}

    assert built(1, 0) == built(1, 99)
    drawn = method != "pissa"  # the singular vectors of W are what they are
    assert (built(1, 0) != built(2, 0)) == drawn


@every_method
def test_a_seeded_adapt_leaves_the_global_generator_alone(method: str) -> None:
    model = BACKBONES["llama"]()
    before = torch.get_rng_state()
    furina.adapt(model, small(method), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    furina.adapt(BACKBONES["llama"](), small(method))
    assert not torch.equal(torch.get_rng_state(), before)


@every_method
def test_two_linears_do_not_start_alike(method: str) -> None:
    model = furina.adapt(BACKBONES["llama"](), small(method), seed=0)
    first, second = (
        model.get_submodule(f"model.layers.{i}.self_attn.q_proj").lora_A for i in range(2)
    )
    assert not torch.equal(first, second)


@every_method
@every_backbone
@pytest.mark.parametrize("training", [False, True])
def test_removing_gives_back_the_very_same_model(method, backbone, training) -> None:
    model = BACKBONES[backbone]().train(training)
    model.lm_head.weight.requires_grad_(False)
    next(iter(model.model.layers)).self_attn.q_proj.weight.requires_grad_(False)
    before = fingerprint(model)
    furina.adapt(model, small(method), seed=0)
    perturb(model)
    model(**tokens())
    assert furina.remove(model) is model
    assert fingerprint(model) == before
    furina.adapt(model, small(method), seed=0)
    furina.remove(model)
    assert fingerprint(model) == before


def test_hooks_of_others_survive_adapting_and_removing() -> None:
    model, calls = Chain().double(), []
    model.first.register_forward_hook(lambda *_: calls.append("linear"))
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    furina.adapt(model, small("furina"), targets=["first"], seed=0)
    x = torch.randn(2, 11, dtype=torch.float64)
    model(x)
    assert calls == ["model", "linear"]
    furina.remove(model)
    model(x)
    assert calls == ["model", "linear"] * 2


@every_method
def test_the_adapters_new_modules_are_in_the_models_mode(method: str) -> None:
    for mode in (True, False):
        model = BACKBONES["llama"]().train(mode)
        furina.adapt(model, small(method))
        assert {module.training for module in model.modules()} == {mode}


def test_what_needs_an_adapter_says_so() -> None:
    model = BACKBONES["llama"]()
    assert not furina.is_adapted(model)
    for call in (furina.remove, furina.describe, furina.merge, furina.unmerge, furina.is_merged):
        with pytest.raises(ConfigurationError, match=r"has no adapter: call furina.adapt"):
            call(model)


@every_method
def test_a_state_dict_goes_out_and_in(method: str) -> None:
    model, twin = chain(small(method), seed=1), chain(small(method), seed=2)
    perturb(model)
    state = furina.adapter_state_dict(model)
    assert not any(tensor.requires_grad for tensor in state.values())
    assert not any(".base." in name for name in state)
    furina.load_adapter_state_dict(twin, state)
    copied = furina.adapter_state_dict(twin)
    assert all(torch.equal(copied[name], tensor) for name, tensor in state.items())
    assert all(copied[name].data_ptr() != tensor.data_ptr() for name, tensor in state.items())


@pytest.mark.parametrize("wrong", ["missing", "unexpected", "shape", "nan", "inf"])
def test_a_state_dict_that_does_not_fit_changes_nothing(wrong: str) -> None:
    model = chain(small("lora"))
    state = {name: tensor + 1 for name, tensor in furina.adapter_state_dict(model).items()}
    if wrong == "missing":
        del state["second.lora_B"]
    elif wrong == "unexpected":
        state["third.lora_A"] = torch.zeros(1)
    elif wrong in ("nan", "inf"):
        state["second.lora_B"][1, 1] = float(wrong)
    else:
        state["second.lora_B"] = torch.zeros(5, 4)
    before = fingerprint(model)
    name = {"missing": "second.lora_B", "unexpected": "third.lora_A"}.get(wrong, "second.lora_B")
    with pytest.raises(ConfigurationError, match=name):
        furina.load_adapter_state_dict(model, state)
    assert fingerprint(model) == before


def test_adapting_logs_how_much_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "furina"):
        model = furina.adapt(BACKBONES["llama"](), small("lora"))
    assert f"14 linears wrapped, {furina.describe(model).trainable:,} trainable" in caplog.text


def test_an_adapter_made_in_inference_mode_can_be_trained() -> None:
    model = BACKBONES["llama"]()
    with torch.inference_mode():
        furina.adapt(model, "lora", seed=0)
    model.train()(**tokens()).loss.backward()
    assert all(p.grad is not None for p in furina.adapter_parameters(model).values())


def test_a_linear_of_another_library_is_told_from_torchs_own() -> None:
    Linear = type("Linear", (nn.Linear,), {"__module__": "other.library"})
    model = nn.Sequential(Linear(3, 2))
    with pytest.raises(ConfigurationError, match=r"is a other\.library\.Linear, not a plain"):
        furina.adapt(model, "lora", targets=["0"])
