"""benchmarks/training/attention.py: what it compares, that they agree, and what it writes."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

import furina
from benchmarks.training import attention
from furina.training.loss import IGNORED
from tests.benchmarks.helpers import printed, written

NAMES = ("eager", "sdpa")
SMALL = ["--backbone", "tiny-llama", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
SMALL += ["--lengths", "8", "16", "--tokens", "32", "--rounds", "2"]


@pytest.fixture
def options() -> Namespace:
    made: Namespace = attention.parse(SMALL)
    return made


def padded(options: Namespace) -> dict[str, Tensor]:
    """Return two rows of 16 tokens, of which the first has 8 and then padding."""
    made: dict[str, Tensor] = attention.batch_of("forward_padded", 16, 384, options)
    return made


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return all logits. Shape: (B, T, V)."""
    made: Tensor = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return made


def test_the_script_writes_what_it_prints(options, tmp_path, capsys):
    arguments = [*SMALL, "--results", str(tmp_path)]
    attention.main(arguments)
    report = printed(capsys)
    stem = tmp_path / "attention"
    assert written(stem) == (report, attention.page(report).markdown("attention"))
    cases = [(kind, length) for kind in attention.KINDS for length in (8, 16)]
    assert list(report["seconds"]) == [f"{k}/{name}/{n}" for k, n in cases for name in NAMES]
    assert list(report["ratios"]) == [f"{kind}/sdpa/eager/{length}" for kind, length in cases]
    assert list(report["fastest"]) == [f"{kind}/{length}" for kind, length in cases]
    for kind, n in cases:
        ratio = report["ratios"][f"{kind}/sdpa/eager/{n}"]
        assert report["fastest"][f"{kind}/{n}"] == ("sdpa" if ratio < 1 else "eager")
        own = [report["rounds"][f"{kind}/{name}/{n}"] for name in ("sdpa", "eager")]
        assert ratio == pytest.approx(sum(a / b for a, b in zip(*own, strict=True)) / 2)
    words = ["python -m benchmarks.training.attention", *SMALL, "--results", tmp_path.name]
    assert report["command"] == " ".join(words)
    assert report["environment"]["packages"].keys() >= {"torch", "transformers"}
    assert report["settings"]["lengths"] == [8, 16] and "results" not in report["settings"]


def test_the_implementations_differ_and_give_the_same_logits_and_losses(options):
    cases, apart = attention.prepare(options)
    for case in cases.values():
        assert [variant.model.config._attn_implementation for variant in case.values()] == [*NAMES]
        eager, sdpa = (variant.model.get_input_embeddings().weight for variant in case.values())
        assert eager is sdpa
    assert list(apart) == [f"{k}/sdpa/eager/{n}" for k in attention.KINDS[2:] for n in (8, 16)]
    config = cases["forward", 16]["eager"].model.config
    # A sum of n terms in another order is off by n roundings at most, and a layer of attention adds
    # up over one head for a score and over 16 tokens for a value.
    terms = config.num_hidden_layers * (config.head_dim + 16)
    tolerance = terms * torch.finfo(torch.float32).eps
    for found in apart.values():
        assert found["largest_logit"] > 1
        assert found["difference"] < tolerance * found["largest_logit"]
    for length in (8, 16):
        for ending in ("", "_padded"):
            steps = [cases[kind + ending, length] for kind in ("training", "forward")]
            losses = [variant.run().item() for case in steps for variant in case.values()]
            assert losses == pytest.approx(losses[:1] * 4, rel=tolerance)


def test_training_goes_back_to_the_activations_and_a_forward_builds_no_graph(options):
    cases, _ = attention.prepare(options)
    for (kind, _), case in cases.items():
        for variant in case.values():
            embedded: list[Tensor] = []
            variant.model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output, embedded=embedded: embedded.append(output)
            )
            loss = variant.run()
            (output,) = embedded
            assert not loss.requires_grad
            assert (output.grad is not None) == kind.startswith("training")
            assert all(parameter.grad is None for parameter in variant.model.parameters())


def test_a_timed_step_gives_its_layers_a_mask_but_sdpa_none_where_nothing_is_padded(options):
    cases, _ = attention.prepare(options)
    for (kind, _), case in cases.items():
        for name, variant in case.items():
            masks: list[Tensor | None] = []
            variant.model.model.layers[-1].register_forward_pre_hook(
                lambda module, args, kwargs, masks=masks: masks.append(kwargs["attention_mask"]),
                with_kwargs=True,
            )
            variant.run()
            (mask,) = masks
            assert (mask is None) == (name == "sdpa" and not kind.endswith("_padded"))


def test_half_of_the_padded_rows_are_half_as_long_and_end_in_their_answer(options):
    batch = padded(options)
    assert batch["attention_mask"].sum(1).tolist() == [8, 16]
    answered = batch["labels"] != IGNORED
    assert torch.equal(answered.nonzero()[:, 1], torch.tensor([*range(8), *range(8, 16)]))
    assert torch.equal(batch["labels"][answered], batch["input_ids"][answered])
    plain = attention.batch_of("forward", 16, 384, options)
    assert plain["attention_mask"].all()
    assert torch.equal(plain["input_ids"], batch["input_ids"])


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_token_reaches_no_other_position(options, name):
    backbone = furina.load_backbone("tiny-llama", "float32")
    batch = padded(options)
    model = attention.make("forward", name, backbone, batch).model
    changed = {key: tensor.clone() for key, tensor in batch.items()}
    changed["input_ids"][0, 8] += 1
    moved = (logits(model, batch) != logits(model, changed)).any(-1).nonzero().tolist()
    assert moved == [[0, 8]]
    # Real tokens come before the padding, and so causality alone would hide it from them. What
    # shows that the mask arrives is the padding behind it: without a mask, it sees the change.
    for inputs in (batch, changed):
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    moved = (logits(model, batch) != logits(model, changed)).any(-1).nonzero().tolist()
    assert moved == [[0, position] for position in range(8, 16)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "8", "12"], "12 of 32 does not"),
        (["--lengths", "32"], "32 of 32 does not"),
        (["--lengths", "2"], "2 of 32 does not"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--device", "gpu7"], "argument --device: gpu7: "),
        (["--dtype", "float31"], "There is no dtype 'float31'"),
        (["--backbone", "tiny-lama"], "tiny-lama"),
    ],
)
def test_wrong_input_gives_one_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        attention.main([*SMALL, *arguments])
    assert stop.value.code not in (None, 0)
    said = capsys.readouterr().err if stop.value.code == 2 else str(stop.value.code)
    last = said.splitlines()[-1]
    assert sentence in last and "error: " in last and "Traceback" not in said


def test_a_model_without_the_implementation_is_named(options, monkeypatch):
    backbone = furina.load_backbone("tiny-llama", "float32")
    monkeypatch.setattr(type(backbone), "_can_set_attn_implementation", lambda self: False)
    with pytest.raises(furina.errors.FurinaError, match=r"^LlamaForCausalLM cannot use eager"):
        attention.make("forward", "eager", backbone, padded(options))
