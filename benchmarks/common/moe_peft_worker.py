"""Steps and generations of one moe_peft method, in an environment of its own.

What it answers is in `load`: `step` by its seconds and its loss, `memory N` by the bytes that N
steps need, `generate PROMPT N` by the seconds of each of N tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from moe_peft import LLMBatchConfig, LLMModel, LLMModelInput, TrainConfig, adapter_factory
from moe_peft.common import cache_factory
from moe_peft.trainer import _compute_loss
from torch import Tensor

from benchmarks.common.memory import rise
from benchmarks.common.serve import Commands, serve, versions

NAME = "trial"
NO_DROPOUT = 1e-9  # its LoRA asserts a rate above 0


class Trial:
    """A model with one adapter, trained on one batch as moe_peft's trainer does it."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Load, adapt and prepare the trainer's own optimiser."""
        self.setup = setup
        torch.manual_seed(setup["seed"])
        self.model = LLMModel.from_pretrained(
            setup["folder"],
            device=setup["device"],
            attn_impl="eager",
            load_dtype=getattr(torch, setup["dtype"]),
        )
        self.model.init_adapter(adapter(setup))
        if setup["dropout"] == 0:
            self.silence_experts()
        rows = len(setup["input_ids"])
        self.config = TrainConfig(
            adapter_name=NAME,
            num_epochs=1,
            batch_size=rows,
            micro_batch_size=rows,
            learning_rate=setup["learning_rate"],
        )
        weights = self.model.get_adapter_weight_dict(NAME)
        self.trainable = sum(weight.numel() for weight in weights.values() if weight.requires_grad)
        self.config.prepare(weights)
        self.config.prepare_lr_scheduler(rows)

    def linears(self) -> Iterator[Any]:
        """Yield every linear of every block."""
        for layer in self.model.model_.layers_:
            for group in layer.state_dict():
                yield from group.values()

    def silence_experts(self) -> None:
        """Turn the experts' dropout off; only the LoRA outside a mixture needs it above 0."""
        for linear in self.linears():
            for name, lora in linear.loras_.items():
                if name.startswith("moe."):
                    lora.dropout_.p = 0.0

    def inputs(self) -> LLMModelInput:
        """Return the batch as its dispatcher does: a forward takes it out of the object."""
        return LLMModelInput(
            batch_configs_=[LLMBatchConfig(NAME, 0, len(self.setup["input_ids"]))],
            batch_tokens_=self.setup["input_ids"],
            batch_labels_=self.setup["labels"],
            batch_masks_=self.setup["attention_mask"],
            gradient_checkpoint_=self.setup["checkpoint"],
        )

    def step(self) -> tuple[float, float]:
        """Do one step as `moe_peft.train` does, without clipping; return its seconds and loss."""
        synchronise()
        start = time.perf_counter()
        loss = _compute_loss({NAME: self.config}, self.model.forward(self.inputs()))
        loss.backward()
        self.config.step()
        synchronise()
        return time.perf_counter() - start, loss.item()

    def memory(self, steps: int) -> int:
        """Return the bytes that the first steps need beside the model."""
        return rise(lambda: [self.step() for _ in range(steps)], self.weights())

    @torch.inference_mode()
    def generate(self, tokens: list[list[int]], new_tokens: int) -> list[float]:
        """Decode greedily with its dynamic cache; return the seconds of every token."""
        room = len(tokens[0]) + new_tokens
        cache = cache_factory("dynamic", self.model.model_.model_config(), len(tokens), room)
        seconds = []
        for _ in range(new_tokens):
            synchronise()
            start = time.perf_counter()
            batch = [LLMBatchConfig(NAME, 0, len(tokens))]
            inputs = LLMModelInput(batch_configs_=batch, batch_tokens_=tokens, inference_mode_=True)
            (output,) = self.model.forward(inputs, cache)
            tokens = output.logits[:, -1:].argmax(-1).tolist()
            synchronise()
            seconds.append(time.perf_counter() - start)
        return seconds

    def weights(self) -> Iterator[Tensor]:
        """Yield what was loaded."""
        yield self.model.model_.embed_tokens_.token_embedding_
        yield self.model.model_.lm_head_.weight
        for linear in self.linears():
            yield linear.base_layer_.weight


def adapter(setup: dict[str, Any]) -> Any:
    """Return the adapter's config; plain LoRA ignores what is said of experts."""
    method = setup["method"]
    return adapter_factory(
        method.upper(),
        NAME,
        r=setup["rank"],
        lora_alpha=setup["alpha"],
        lora_dropout=setup["dropout"] or NO_DROPOUT,
        target_modules=setup["targets"],
        num_experts=setup["experts"],
        top_k=setup["top_k"],
        routing_strategy=method,
    )


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load(setup: dict[str, Any]) -> tuple[Commands, object]:
    """Return the commands, and what was built."""
    torch.set_num_threads(setup["threads"])
    trial = Trial(setup)
    commands: Commands = {"step": trial.step, "memory": trial.memory, "generate": trial.generate}
    return commands, {"trainable": trial.trainable, "versions": versions("moe_peft", "moe_peft")}


if __name__ == "__main__":
    serve(load)
