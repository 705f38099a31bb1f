from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from furina.errors import ConfigurationError, DataError
from furina.training import answer_logits, answer_loss
from furina.training.loss import select_answers
from tests.training.helpers import tiny, windows


def gemma2() -> Any:
    """A model that soft-caps its logits after lm_head."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=0.5,
        initializer_range=0.5,
    )
    return Gemma2ForCausalLM(config).train()


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).train()


def loss_from_all_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )


@pytest.mark.parametrize("build", [llama, gemma2, tiny])
def test_loss_and_gradient_equal_those_of_the_full_logits(build: Any) -> None:
    model, batch = build(), windows(1)[0][0]
    model.double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    full = loss_from_all_logits(model, batch)
    expected = torch.autograd.grad(full, parameters)
    loss, n = answer_loss(model, batch)
    assert n == (batch["labels"] != -100).sum()
    torch.testing.assert_close(loss, full.to(loss), rtol=1e-5, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-8)


def test_soft_capping_of_the_model_is_applied() -> None:
    logits, _ = answer_logits(gemma2(), windows(1)[0][0])
    assert logits.abs().max() <= 0.5
    assert logits.abs().max() > 0.4


def test_a_label_on_padding_is_an_error() -> None:
    batch = windows(1)[0][0]
    padding = batch["attention_mask"] == 0
    assert padding.any()
    batch["labels"][padding] = batch["input_ids"][padding]  # as labels=input_ids.clone() does
    with pytest.raises(DataError, match=f"{int(padding.sum())} labels .* stand on padding"):
        select_answers(batch)


def test_lm_head_sees_one_row_per_answer_token_and_no_more() -> None:
    model, batch = tiny(), windows(1)[0][0]
    rows = []
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: rows.append(args[0].shape[:-1].numel())
    )
    logits, targets = answer_logits(model, batch)
    handle.remove()
    assert rows == [len(targets)] == [len(logits)] == [(batch["labels"] != -100).sum()]


def called_with(model: nn.Module, *args: str, **kwargs: str) -> nn.Module:
    """Return `model`, which calls its `lm_head` with arguments for these names."""
    head = model.lm_head

    class Head(nn.Module):
        def forward(self, hidden: Tensor, other: object = None) -> Tensor:
            logits: Tensor = head(hidden)
            return logits

    class Caller(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            logits: Tensor = inner(*(hidden for _ in args), **dict.fromkeys(kwargs, hidden))
            return logits

    inner = Head()
    model.lm_head = Caller()
    model.get_output_embeddings = lambda: inner
    return model


def test_an_output_embedding_that_is_called_by_keyword_gives_the_same_logits() -> None:
    batch = windows(1)[0][0]
    expected, _ = answer_logits(tiny(), batch)
    found, _ = answer_logits(called_with(tiny(), hidden="keyword"), batch)
    assert torch.equal(found, expected)


def test_an_output_embedding_of_two_arguments_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="one hidden state per token"):
        answer_logits(called_with(tiny(), "hidden", "other"), windows(1)[0][0])


def test_model_is_left_without_the_hook_even_after_an_error() -> None:
    model, batch = tiny(), windows(1)[0][0]
    with pytest.raises(IndexError):
        answer_logits(model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    shape = model(input_ids=batch["input_ids"]).logits.shape
    assert shape[:2] == batch["input_ids"].shape


def test_loss_is_fp32_for_a_bf16_model() -> None:
    loss, _ = answer_loss(tiny(dtype="bfloat16"), windows(1)[0][0])
    assert loss.dtype == torch.float32


def test_batch_without_answers_gives_zero_loss_and_zero_gradients() -> None:
    model, batch = tiny(), windows(1)[0][0]
    loss, n = answer_loss(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    torch.autograd.backward(loss)
    assert (n, loss.item()) == (0, 0.0)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_first_token_is_never_predicted() -> None:
    labels = torch.tensor([[5, -100, 7], [-100, 8, -100]])
    answers = select_answers({"input_ids": torch.ones_like(labels), "labels": labels})
    assert answers.targets.tolist() == [7, 8]
    assert answers.positions.tolist() == [1, 3]


def test_extra_inputs_reach_the_model() -> None:
    model, batch = tiny(), windows(1)[0][0]
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    plain, _ = answer_loss(model, batch)
    shifted, _ = answer_loss(model, {**batch, "position_ids": positions * 3})
    assert plain != shifted


def test_missing_labels_are_named() -> None:
    with pytest.raises(DataError, match="no 'labels'"):
        select_answers({"input_ids": torch.ones(1, 2, dtype=torch.long)})


def test_model_without_output_embedding_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no output embedding"):
        answer_logits(nn.Linear(2, 2), windows(1)[0][0])


def test_labels_of_another_integer_type_give_the_same_loss() -> None:
    batch = windows(1)[0][0]
    expected, _ = answer_loss(tiny(), batch)
    found, _ = answer_loss(tiny(), {name: tensor.int() for name, tensor in batch.items()})
    assert torch.equal(found, expected)
