"""The variants that step.py times in its own process: ours and peft's, on shared weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

import furina
from benchmarks.common.memory import rise
from benchmarks.common.models import LEARNING_RATE, adapt, peft_model, twin
from benchmarks.common.rounds import timed
from furina.data.batches import Batch
from furina.model.state import state_of
from furina.training.loss import IGNORED, AnswerBatch, answer_logits, mean_nll, select_answers

ANSWER_TOKENS = 8
CLIP = 1.0
PEFT = ("peft_lora", "peft_lora_bf16", "peft_dora", "peft_dora_bf16")
NO_LOSS = "furina_no_loss"
"""FURINA without its selection loss."""


@dataclass
class Variant:
    """A model and what one optimiser step of it is, which returns the loss."""

    run: Callable[[], Tensor]
    model: nn.Module
    trainable: int
    versions: dict[str, str] = field(default_factory=dict)

    def step(self) -> tuple[float, float]:
        """Do one step; return its seconds and its loss."""
        seconds, loss = timed(self.run)
        return seconds, loss.item()

    def memory(self, steps: int) -> int:
        """Return the bytes that the first steps need beside the model; call it before any other."""
        return rise(lambda: [self.run() for _ in range(steps)], self.model.parameters())

    def close(self) -> None:
        """Nothing has to be ended."""


def random_batch(vocabulary: int, rows: int, tokens: int, seed: int) -> Batch:
    """Return random tokens, of which only the last few of a row are the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[:, :-ANSWER_TOKENS] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def build(name: str, backbone: nn.Module, batch: Batch, options: Namespace) -> Variant:
    """Put the variant `name` on a twin of `backbone`; raises FurinaError where it does not fit."""
    model: Any = twin(backbone)
    batch = {key: tensor.to(options.device) for key, tensor in batch.items()}
    # Located once and for all, as the data hooks do it outside the step.
    answers = select_answers(batch)
    if name == "floor":
        return floor(model, answers)
    loop, _, peer = name.rpartition("/")
    if peer not in PEFT:
        return ours(name, model, answers, options)
    model = peft_model(peer, model, options)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = (
        shipped_step(model, batch, parameters)
        if loop == "as_shipped"
        else own_step(model, answers, parameters, AdamW(parameters, LEARNING_RATE, fused=True))
    )
    return Variant(step, model, sum(p.numel() for p in parameters), {"peft": peft.__version__})


def floor(model: Any, answers: AnswerBatch) -> Variant:
    """Return our loop without adapters: gradients go through all activations, to no weight."""
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )

    def step() -> Tensor:
        loss = mean_nll(*answer_logits(model, answers))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return Variant(step, model, trainable=0)


def ours(name: str, model: Any, answers: AnswerBatch, options: Namespace) -> Variant:
    """Return our loop with one of our methods."""
    method, more = ("furina", {"selection_coefficient": 0.0}) if name == NO_LOSS else (name, {})
    adapt(model, method, options, **more)
    parameters = list(furina.adapter_parameters(model).values())
    optimizer = AdamW(furina.parameter_groups(model, LEARNING_RATE), fused=True)
    step = own_step(model, answers, parameters, optimizer)
    return Variant(step, model, furina.describe(model).trainable)


def own_step(
    model: Any, answers: AnswerBatch, parameters: list[nn.Parameter], optimizer: AdamW
) -> Callable[[], Tensor]:
    """Return a step of our loop: answer-only logits and a fused optimiser, for any adapter."""
    adapted = furina.is_adapted(model)
    auxiliary = adapted and state_of(model).config.has_auxiliary_loss

    def loss_of() -> Tensor:
        loss = mean_nll(*answer_logits(model, answers))
        return loss + furina.auxiliary_loss(model) if auxiliary else loss

    def after_step() -> None:
        if adapted:
            furina.after_step(model)

    return _step(loss_of, parameters, optimizer, after_step)


def shipped_step(model: Any, batch: Batch, parameters: list[nn.Parameter]) -> Callable[[], Tensor]:
    """Return a step as peft's examples write it: the model's own loss over all logits."""
    optimizer = AdamW(parameters, LEARNING_RATE)
    return _step(lambda: model(**batch).loss, parameters, optimizer, lambda: None)


def _step(
    loss_of: Callable[[], Tensor],
    parameters: list[nn.Parameter],
    optimizer: AdamW,
    after_step: Callable[[], None],
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        after_step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
