"""One vLLM engine, in an environment of its own; `load` has what it answers."""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

# In this process: a step is then a call, and its time is the engine's alone.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from benchmarks.common.serve import Commands, serve, versions

Tokens = list[int]


class Engine:
    """A loaded model, with a LoRA or without, that is asked with token ids."""

    def __init__(self, setup: dict[str, Any]) -> None:
        """Load the model, and the adapter if there is one."""
        rank = setup["rank"]
        lora: dict[str, Any] = {}
        if rank:
            lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
            # Its head would be wrapped too, and a wrapped one cannot tell prompt_logprobs on a CPU.
            config = json.loads((Path(setup["adapter"]) / "adapter_config.json").read_text())
            lora["lora_target_modules"] = config["target_modules"]
        self.llm = LLM(
            setup["model"],
            skip_tokenizer_init=True,
            dtype=setup["dtype"],
            max_model_len=setup["max_tokens"],
            enable_prefix_caching=False,  # a prompt is to be read, whoever asked before
            enforce_eager=True,
            gpu_memory_utilization=setup["memory_share"],
            seed=0,
            **lora,
        )
        self.engine = self.llm.llm_engine
        self.lora = LoRARequest("adapter", 1, setup["adapter"]) if rank else None
        if self.lora and not self.engine.add_lora(self.lora):
            raise ValueError("the adapter was not loaded")
        self.asked = 0

    def times(self, prompt: Tokens, new_tokens: int) -> list[float]:
        """Generate after one prompt; return the seconds of every token."""
        self.asked += 1
        start = time.perf_counter()
        self.engine.add_request(
            str(self.asked),
            TokensPrompt(prompt_token_ids=prompt),
            greedy(new_tokens),
            lora_request=self.lora,
        )
        seconds: list[float] = []
        while self.engine.has_unfinished_requests():
            (output,) = self.engine.step() or [None]
            now = time.perf_counter()
            made = len(output.outputs[0].token_ids) if output else len(seconds)
            if made > len(seconds):
                seconds += [0.0] * (made - len(seconds) - 1) + [now - start]
                start = now
        return seconds

    def generate(self, prompts: list[Tokens], new_tokens: int) -> list[Tokens]:
        """Return the tokens that follow each prompt, greedily and whatever they are."""
        outputs = self._ask(prompts, greedy(new_tokens))
        return [list(output.outputs[0].token_ids) for output in outputs]

    def score(self, prompts: list[Tokens]) -> list[dict[str, list[float]]]:
        """Return, for each prompt, what stands behind each of its tokens but the last.

        `top` is the likeliest next token, `logprob` the log-probability of the real one.
        """
        found = []
        for prompt, output in zip(prompts, self._ask(prompts, scoring()), strict=True):
            told = output.prompt_logprobs[1:]  # the first token has nothing before it
            top = [min(one.items(), key=lambda item: item[1].rank)[0] for one in told]
            real = [one[token].logprob for token, one in zip(prompt[1:], told, strict=True)]
            found.append({"top": top, "logprob": real})
        return found

    def _ask(self, prompts: list[Tokens], params: SamplingParams) -> list[Any]:
        wrapped = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        answers: list[Any] = self.llm.generate(
            wrapped, params, use_tqdm=False, lora_request=self.lora
        )
        return answers


def greedy(new_tokens: int) -> SamplingParams:
    """Return the settings for exactly so many of the likeliest tokens."""
    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)


def scoring() -> SamplingParams:
    """Return the settings that tell of the prompt's own tokens."""
    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)


def vllm_package() -> str:
    """Return the name of the distribution: the CPU build has one of its own."""
    (name, *_) = importlib.metadata.packages_distributions()["vllm"]
    return name


def load(setup: dict[str, Any]) -> tuple[Commands, object]:
    """Return the engine's commands; and the seconds that loading took, and the versions."""
    start = time.perf_counter()
    engine = Engine(setup)
    seconds = time.perf_counter() - start
    commands: Commands = {"times": engine.times, "generate": engine.generate, "score": engine.score}
    package = vllm_package()
    return commands, {"seconds": seconds, "versions": versions("vllm", package), "package": package}


if __name__ == "__main__":
    serve(load)
