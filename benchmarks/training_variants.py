"""The variants that training.py times in its own process: ours and peft's, on shared weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import peft
import torch
from peak_memory import rise
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

import furina
from furina.model.inject import DEFAULT_TARGETS
from furina.model.state import state_of
from furina.training.loss import IGNORED, AnswerBatch, answer_logits, mean_nll, select_answers

ANSWER_TOKENS = 8
CLIP = 1.0
LEARNING_RATE = 1e-4
PEFT = ("peft_lora", "peft_lora_bf16", "peft_dora", "peft_dora_bf16")
NO_LOSS = "furina_no_loss"
"""FURINA without its selection loss."""

Batch = dict[str, Tensor]
Step = Callable[[], Tensor]


@dataclass
class Variant:
    """A model and what one optimiser step of it is, which returns the loss."""

    step: Step
    model: nn.Module
    trainable: int
    versions: dict[str, str] = field(default_factory=dict)
    loss: float = float("nan")

    def seconds(self) -> float:
        """Do one step; return how long it took."""
        synchronise()
        start = time.perf_counter()
        loss = self.step()
        synchronise()
        seconds = time.perf_counter() - start
        self.loss = loss.item()
        return seconds

    def memory(self, steps: int) -> int:
        """Return the bytes that the first steps need beside the model; call it before any other."""
        return rise(lambda: [self.step() for _ in range(steps)], self.model.parameters())

    def close(self) -> None:
        """Nothing has to be ended."""


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_batch(vocabulary: int, options: Any) -> Batch:
    """Return random tokens, of which only the last few of a row are the answer."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.rows, options.tokens)
    ids = torch.randint(vocabulary, shape, generator=generator)
    labels = ids.clone()
    labels[:, :-ANSWER_TOKENS] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def twin(model: nn.Module) -> nn.Module:
    """Return a model with modules of its own that shares every parameter, in training mode."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, shared).train()


def build(name: str, backbone: nn.Module, batch: Batch, options: Any) -> Variant:
    """Put the variant `name` on a twin of `backbone`; raises FurinaError where it does not fit."""
    model = twin(backbone)
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
    shipped = loop == "as_shipped"
    step = (
        shipped_step(model, batch, parameters)
        if shipped
        else own_step(model, answers, parameters, AdamW(parameters, LEARNING_RATE, fused=True))
    )
    return Variant(step, model, sum(p.numel() for p in parameters), {"peft": peft.__version__})


def floor(model: nn.Module, answers: AnswerBatch) -> Variant:
    """Return our loop without adapters: gradients go through all activations, to no weight."""
    model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )

    def step() -> Tensor:
        loss = mean_nll(*answer_logits(model, answers))
        loss.backward()
        return loss.detach()

    return Variant(step, model, trainable=0)


def ours(name: str, model: nn.Module, answers: AnswerBatch, options: Any) -> Variant:
    """Return our loop with one of our methods."""
    method = "furina" if name == NO_LOSS else name
    chosen = method_options(method, options)
    if name == NO_LOSS:
        chosen["selection_coefficient"] = 0.0
    furina.adapt(model, method, seed=options.seed, **chosen)
    parameters = list(furina.adapter_parameters(model).values())
    optimizer = AdamW(furina.parameter_groups(model, LEARNING_RATE), fused=True)
    step = own_step(model, answers, parameters, optimizer)
    return Variant(step, model, furina.describe(model).trainable)


def method_options(method: str, options: Any) -> dict[str, Any]:
    """Return a method's options at the total rank asked for, cut into experts if it has them."""
    defaults = {field.name: field.default for field in fields(furina.methods()[method])}
    chosen: dict[str, Any] = {"dropout": options.dropout, "rank": options.rank}
    if "allocation" in defaults:  # as many experts in every layer
        chosen |= {"rank": options.rank // options.experts, "allocation": [options.experts]}
    elif "num_experts" in defaults:
        chosen |= {"rank": options.rank // options.experts, "num_experts": options.experts}
    if "active_rank" in defaults:  # the default's share of the ranks
        chosen["active_rank"] = options.rank * defaults["active_rank"] // defaults["rank"]
    if "svd_iterations" in defaults:  # only the start is slow
        chosen["svd_iterations"] = 2
    return chosen


def peft_model(peer: str, model: nn.Module, options: Any) -> nn.Module:
    """Return peft's model; its adapter is fp32 unless the variant says bf16."""
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules=list(DEFAULT_TARGETS),
        use_dora="dora" in peer,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(options.seed)
    cast = not peer.endswith("_bf16")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=cast)


def own_step(
    model: nn.Module, answers: AnswerBatch, parameters: list[nn.Parameter], optimizer: AdamW
) -> Step:
    """Return a step of our loop: answer-only logits and a fused optimiser, for any adapter."""
    adapted = furina.is_adapted(model)
    auxiliary = adapted and state_of(model).config.has_auxiliary_loss

    def step() -> Tensor:
        loss = mean_nll(*answer_logits(model, answers))
        if auxiliary:
            loss = loss + furina.auxiliary_loss(model)
        loss.backward()
        clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        if adapted:
            furina.after_step(model)
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def shipped_step(model: nn.Module, batch: Batch, parameters: list[nn.Parameter]) -> Step:
    """Return a step as peft's examples write it: the model's own loss over all logits."""
    optimizer = AdamW(parameters, LEARNING_RATE)

    def step() -> Tensor:
        loss = model(**batch).loss
        loss.backward()
        clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
