"""What targets find is a plain linear that nothing bypasses, or it is refused with the reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import furina
from furina.errors import ConfigurationError
from furina.model.state import state_of
from tests.helpers import SIDES, Chain, fingerprint, perturb, raw, small, tiny_llama, tokens


def refusal(model: nn.Module, targets: Any = None) -> str:
    """Return the one sentence with which adapting fails, after which nothing has changed."""
    before = {name: (id(m), len(m._forward_hooks)) for name, m in model.named_modules()}
    with pytest.raises(ConfigurationError) as caught:
        furina.adapt(model, small("lora"), targets=targets)
    assert {name: (id(m), len(m._forward_hooks)) for name, m in model.named_modules()} == before
    assert not furina.is_adapted(model)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def build(name: str, **options: Any) -> Any:
    """Return a tiny causal LM of a configuration's name."""
    import transformers

    sides = {**SIDES, "n_embd": 24, "n_layer": 2, "n_head": 4, "state_size": 4, "ffn_dim": 40}
    del sides["initializer_range"]
    sides |= {"word_embed_proj_dim": 24, **options}
    torch.manual_seed(0)
    config = getattr(transformers, name)(**sides)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


MOE = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}


class Sub(nn.Parameter):
    """A parameter of another kind, as quantised and sharded weights are."""


def patched(linear: nn.Linear) -> None:
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


def recast(dtype: torch.dtype) -> Callable[[nn.Linear], None]:
    def cast(linear: nn.Linear) -> None:
        linear.weight = nn.Parameter(torch.ones(7, 11).to(dtype), requires_grad=False)

    return cast


DISGUISES: dict[str, tuple[Callable[[nn.Linear], Any], str]] = {
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), "weight of first is computed"),
    "pruned bias": (lambda m: prune.l1_unstructured(m, "bias", 0.5), "of first is computed"),
    "weight_norm": (nn.utils.weight_norm, "weight of first is computed"),
    "spectral_norm": (nn.utils.spectral_norm, "weight of first is computed"),
    "parametrised": (nn.utils.parametrizations.weight_norm, "ParametrizedLinear"),
    "patched": (patched, "forward of first was replaced"),
    "another kind": (lambda m: setattr(m, "weight", Sub(m.weight.detach())), "first is a Sub"),
    "emptied": (
        lambda m: setattr(m.weight, "data", torch.empty(0)),  # as ZeRO-3 leaves it
        "first has shape (0,)",
    ),
    "integers": (recast(torch.int8), "first is torch.int8"),
    "eight bits": (recast(torch.float8_e4m3fn), "first is torch.float8_e4m3fn"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_linear_that_is_not_what_it_seems_is_refused_with_the_reason(disguise: str) -> None:
    model = Chain()
    disguised, words = DISGUISES[disguise]
    disguised(model.first)
    assert words in refusal(model, ["first"])
    furina.adapt(model, small("lora"), targets=["second"])  # the others are as good as before


def test_weights_that_share_their_memory_are_refused_as_tied() -> None:
    """Two parameters, one storage: merging one would write into the other."""
    model = Chain((7, 7, 7))
    model.second.weight = nn.Parameter(model.first.weight.data)
    assert "weight of second is tied" in refusal(model, ["second"])


def test_parts_of_one_storage_that_do_not_overlap_can_be_adapted() -> None:
    model = Chain((7, 7, 7)).double()
    both = torch.randn(14, 7, dtype=torch.float64)
    model.first.weight, model.second.weight = (nn.Parameter(part) for part in both.chunk(2))
    furina.adapt(model, small("lora"), targets=["first", "second"], seed=0)
    perturb(model)
    x = torch.randn(3, 7, dtype=torch.float64)
    expected = model(x)
    furina.merge(model)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_an_offloaded_weight_is_refused(where: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_llama()
    if where == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert "q_proj is offloaded" in refusal(model)


def test_accelerates_hooks_that_only_move_the_input_are_no_reason_to_refuse() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain = tiny_llama(), tiny_llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            hooks.add_hook_to_module(module, hooks.AlignDevicesHook("cpu"))
    batch = tokens()
    furina.adapt(model, small("lora"), seed=0)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
        perturb(model)
        unmerged = model(**batch).logits
        furina.merge(model)
        torch.testing.assert_close(model(**batch).logits, unmerged, rtol=1e-3, atol=1e-3)


def test_a_patched_linear_below_accelerates_hook_is_refused() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = Chain()
    patched(model.first)
    hooks.add_hook_to_module(model.first, hooks.AlignDevicesHook("cpu"))
    assert "forward of first was replaced" in refusal(model, ["first"])


@pytest.mark.parametrize("targets", [None, ["model.layers.0.*.q_proj"], ["q_proj"]])
@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        (torch.compile, "torch.compile"),
        (nn.DataParallel, "DataParallel"),
        (torch.optim.swa_utils.AveragedModel, "AveragedModel"),
    ],
)
def test_a_wrapped_model_is_refused_with_what_to_do(wrap: Any, kind: str, targets: Any) -> None:
    message = refusal(wrap(tiny_llama()), targets)
    assert f"wrapped by {kind}" in message and "adapt the model first, then wrap it" in message


def test_a_model_of_peft_is_refused() -> None:
    peft = pytest.importorskip("peft")
    inner = tiny_llama()
    message = refusal(peft.get_peft_model(inner, peft.LoraConfig(target_modules=["v_proj"])))
    assert "wrapped by peft" in message
    assert "v_proj is a peft.tuners.lora.layer.Linear, not a plain" in refusal(inner)


def test_a_wrapped_part_of_a_model_is_named() -> None:
    model = tiny_llama()
    model.model.layers[1] = torch.compile(model.model.layers[1])  # type: ignore[assignment]
    assert "model.layers.1 is wrapped by torch.compile" in refusal(model)
    furina.adapt(model, small("lora"), targets=["model.layers.0.*_proj"])


def test_calls_on_a_wrapper_of_an_adapted_model_say_which_model_to_pass() -> None:
    wrapped = torch.compile(furina.adapt(tiny_llama(), small("lora")))
    for call in (furina.remove, furina.describe, furina.merge, furina.adapter_state_dict):
        with pytest.raises(ConfigurationError, match=r"wrapped by torch.compile: pass the adapted"):
            call(wrapped)


class Reader(nn.Module):
    """A block that uses a linear's weight itself, in a method that its forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(5, 5)
        self.read = nn.Linear(5, 5)
        self.drawn = nn.Linear(5, 5)
        nn.init.zeros_(self.drawn.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper(self.drawn(self.plain(x)))

    def helper(self, x: torch.Tensor) -> torch.Tensor:
        return sum(x @ self.read.weight for _ in range(1))


def test_a_linear_whose_weight_is_read_past_its_forward_is_refused() -> None:
    model = nn.Sequential(Reader())
    assert "Reader reads the weight of 0.read itself" in refusal(model, ["read"])
    furina.adapt(model, small("lora"), targets=["plain", "drawn"])


@pytest.mark.parametrize("name", ["MambaConfig", "FalconMambaConfig"])
def test_mamba_is_adapted_where_its_mixer_calls_the_linear_and_refused_elsewhere(name) -> None:
    for target in ("dt_proj", "x_proj", "out_proj"):
        message = refusal(build(name), [target])
        assert f"Mixer reads the weight of backbone.layers.0.mixer.{target} itself" in message
    model = furina.adapt(build(name), small("lora"), targets=["in_proj"], seed=0)
    perturb(model)
    batch = tokens()
    model.train()(**batch).loss.backward()
    with torch.no_grad():
        unmerged = model.eval()(**batch).logits
        furina.merge(model)
        torch.testing.assert_close(model(**batch).logits, unmerged, rtol=1e-3, atol=1e-4)


def test_a_reading_that_an_option_turns_off_is_no_reason_to_refuse() -> None:
    targets = ["dense", "dense_4h_to_h", "query_key_value"]
    furina.adapt(build("BloomConfig", hidden_size=24), small("lora"), targets=targets)
    exact = build("BloomConfig", hidden_size=24, slow_but_exact=True)
    assert "BloomAttention reads the weight" in refusal(exact, targets)


@pytest.mark.parametrize(
    ("name", "options", "words", "never"),
    [
        ("GPT2Config", {}, ["c_attn, c_fc, c_proj are Conv1D", "none of its linears"], "targets"),
        ("Phi3Config", {}, ["name targets", "end in: down_proj, gate_up_proj"], "Conv1D"),
        (
            "Qwen3MoeConfig",
            MOE,
            ["no gate_proj, up_proj, down_proj,", "experts are fused tensors", "k_proj"],
            "q_proj, k_proj, v_proj, o_proj",
        ),
        ("BloomConfig", {}, ["dense, dense_4h_to_h, dense_h_to_4h, query_key_value."], "lm_head"),
        ("OPTConfig", {}, ["has no o_proj", "fc1, fc2, k_proj, out_proj, q_proj"], "lm_head"),
        ("GPTNeoXConfig", {}, ["dense, dense_4h_to_h, dense_h_to_4h"], "Conv1D"),
        ("MambaConfig", {}, ["linears that could match end in: in_proj."], "lm_head"),
        ("FalconConfig", {}, ["query_key_value are FalconLinear", "none of its"], "lm_head"),
    ],
)
def test_where_the_default_targets_are_not_there_it_says_why_and_what_is(
    name: str, options: dict[str, int], words: list[str], never: str
) -> None:
    message = refusal(build(name, **options))
    assert all(word in message for word in [*words, "which are adapted by default"]), message
    assert never not in message and "lm_head" not in message.partition("end in: ")[0]
    assert "Target '" not in message


def test_all_linear_is_answered_with_the_models_linears() -> None:
    message = refusal(build("Phi3Config"), "all-linear")
    assert "not 'all-linear': linears that could match end in: down_proj, gate_up_proj" in message


@pytest.mark.parametrize("targets", [None, ["gate_proj", "up_proj"], ["down_proj"]])
def test_fused_experts_beside_a_shared_one_are_warned_of_once(targets: Any) -> None:
    model = build("Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=30)
    with pytest.warns(UserWarning, match=r"\(4 tensors such as model.*experts") as caught:
        furina.adapt(model, small("lora"), targets=targets)
    assert len([w for w in caught if "fused tensors" in str(w.message)]) == 1
    assert caught[0].filename == __file__
    assert any("shared_expert" in name for name in state_of(model).layers)


def test_who_asks_for_the_attention_alone_is_not_warned_of_experts() -> None:
    model = build("Qwen2MoeConfig", **MOE, shared_expert_intermediate_size=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        furina.adapt(model, small("lora"), targets=["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("r", "rank"),
        ("lora_alpha", "alpha"),
        ("lora_dropout", "dropout"),
        ("target_modules", "targets"),
        ("target", "targets"),
    ],
)
def test_peft_names_of_options_are_answered_with_ours(option: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{option!r}. Did you mean '{meant}'"):
        furina.adapt(tiny_llama(), "lora", **{option: 8})
    with pytest.raises(ConfigurationError, match=f"{option!r}. Did you mean '{meant}'"):
        furina.configure("furina", {option: 8})


def test_a_config_of_another_library_is_refused() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match="a config of furina's, not a dict"):
        furina.adapt(model, {"r": 8})  # type: ignore[arg-type]
    assert fingerprint(model) == before and raw(model.lm_head.weight)
