"""Merge, convert to GGUF, run in llama.cpp, compare with transformers; the last line is JSON.

    make gguf
    python -m benchmarks.serving.gguf_engine --results results/gguf

A perturbed or a saved adapter is merged and exported as a plain folder, which llama.cpp's own
converter turns into GGUF. transformers and llama.cpp get the same token ids. Compared are whole
greedy continuations, and the next token after every beginning of the same text, where one change
does not bring about others. The yardstick is what merging alone changes inside transformers.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import furina
from benchmarks.common import show
from benchmarks.common.command import Parser, Report, described, run
from benchmarks.common.models import put_in
from benchmarks.common.rounds import changed_ratio
from benchmarks.common.worker import ROOT
from benchmarks.merging import measures
from furina.errors import FurinaError

WORKER = Path(__file__).with_name("gguf_worker.py")
ENVIRONMENT = ROOT / ".venv-gguf"
KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    made = Parser(__doc__, "backbone rank experts threads seed results")
    made.add_argument("--dtypes", nargs="+", choices=KINDS, default=["float32", "bfloat16"])
    made.add_argument("--method", default="furina", help="of the perturbed adapter")
    made.add_argument("--adapter-path", type=Path, help="a saved adapter instead")
    made.add_argument("--update", type=float, default=0.05, help="‖ΔW‖/‖W‖ of each linear")
    made.add_argument("--task", default="arc_easy", help="whose test questions are the prompts")
    made.add_argument("--prompts", type=int, default=16)
    made.add_argument("--new-tokens", type=int, default=24, help="after each prompt")
    made.add_argument("--environment", type=Path, default=ENVIRONMENT, help="made by make gguf")
    return made.checked(arguments, "rank experts prompts new_tokens threads")


def engine(environment: Path, *words: str, questions: Report | None = None) -> Report:
    """Run the worker; return what its last line says, and nothing of a conversion.

    Raises FurinaError if the environment is not there or the worker fails.
    """
    python = environment / "bin" / "python"
    if not python.exists():
        raise FurinaError("llama.cpp is not installed: run `make gguf`.")
    command = [str(python), str(WORKER), *words]
    done = subprocess.run(command, input=json.dumps(questions), capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise FurinaError(f"{words[0]} failed: {last}")
    answers: Report = json.loads(done.stdout.splitlines()[-1]) if questions else {}
    return answers


@torch.inference_mode()
def generate(model: Any, ids: Sequence[int], new_tokens: int) -> list[int]:
    """Return transformers' greedy continuation, which does not stop early."""
    whole = torch.tensor([list(ids)])
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    made = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens


def forced(model: Any, texts: Sequence[list[int]], new_tokens: int) -> list[Tensor]:
    """Return log-probabilities of each next token, at the beginnings that the worker uses, too.

    Shape: (new_tokens, V) for each text.
    """
    found = (measures.logits(model, [text], 1)[-new_tokens - 1 : -1] for text in texts)
    return [logits.float().log_softmax(-1) for logits in found]


def case(dtype: str, asked: list[list[int]], options: Namespace) -> Report:
    """Compare llama.cpp with transformers in one dtype."""
    new, kind = options.new_tokens, KINDS[dtype]
    model = furina.load_backbone(options.backbone, dtype)
    put_in(model, options.method, options.update, options)
    with tempfile.TemporaryDirectory(prefix="gguf-") as name:
        folder, file = Path(name) / "merged", str(Path(name) / "merged.gguf")
        furina.export_merged(model, folder, furina.load_tokenizer(options.backbone))
        merged = furina.load_backbone(str(folder), dtype)
        engine(options.environment, "convert", str(folder), file, kind)
        own = [generate(merged, ids, new) for ids in asked]
        texts = [ids + more for ids, more in zip(asked, own, strict=True)]
        questions = {"prompts": asked, "texts": texts, "new_tokens": new}
        words = ("run", file, kind, str(options.threads))
        answers = engine(options.environment, *words, questions=questions)
    ours, unmerged = forced(merged, texts, new), forced(model, texts, new)
    return {
        "dtype": dtype,
        **compare(own, ours, answers),
        "unmerged_changed": sum(
            int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in zip(ours, unmerged, strict=True)
        ),
        "versions": answers["versions"],
    }


def compare(own: list[list[int]], ours: list[Tensor], answers: Report) -> Report:
    """Count continuations and next tokens that differ from llama.cpp's.

    `difference` is max |Δ log p| of llama.cpp's token, and `widest_gap` the largest lead that
    transformers gave another token over it: how near a tie the changed ones were, in nats.
    """
    differing = sum(a != b for a, b in zip(own, answers["generated"], strict=True))
    changed, difference, widest = 0, 0.0, 0.0
    for table, theirs in zip(ours, answers["forced"], strict=True):
        for row, (token, value) in zip(table, theirs, strict=True):
            lead = (row.max() - row[token]).item()
            changed += int(row.argmax()) != token
            difference = max(difference, abs(row[token].item() - value))
            widest = max(widest, lead)
    return {
        "prompts": len(own),
        "continuations_changed": differing,
        "positions": sum(map(len, ours)),
        "tokens_changed": changed,
        "difference": difference,
        "widest_gap": widest,
    }


def ratios(cases: Sequence[Report], name: str) -> dict[str, float]:
    """Return what llama.cpp changes over what merging changes, half a token added to each."""
    return {
        f"tokens/{name}/{case['dtype']}/gguf_over_merging": changed_ratio(
            case["tokens_changed"], case["unmerged_changed"]
        )
        for case in cases
    }


def measure(options: Namespace, command: str) -> Report:
    """Measure what the options ask for; return the report."""
    torch.set_num_threads(options.threads)
    asked, data = measures.ask(options, options.prompts)
    prompts = [pairs[0][0] for pairs in asked.choices]
    cases = [case(dtype, prompts, options) for dtype in dict.fromkeys(options.dtypes)]
    report = described(options, command)
    report["environment"]["engine"] = [found.pop("versions") for found in cases].pop()
    name = "adapter" if options.adapter_path else options.method
    return {**report, "data": data, "cases": cases, "ratios": ratios(cases, name)}


def page(report: show.Report) -> show.Page:
    """Return the report's table."""
    settings, data = report["settings"], report["data"]
    engine = report["environment"]["engine"]
    remarks = (
        "A merged model's folder, converted to GGUF of the same dtype, against transformers on "
        f"that folder. Whole: greedy continuations of {settings['new_tokens']} tokens that differ "
        "anywhere. Next token: after every beginning of transformers' own text; merging is merged "
        "against unmerged there, in transformers. Of llama.cpp's token max |Δ log p| is the "
        "largest difference, and lead how far it was at most behind transformers' own.",
        f"{settings['backbone']}, {data['task']} {data['subset']}. "
        f"{', '.join(f'{name} {version}' for name, version in engine.items())}; "
        f"{show.commit(report)}. Made by {report['command']}.",
    )
    columns: show.Columns = {
        ("", "dtype"): "dtype",
        ("whole", "prompts"): "prompts d",
        ("whole", "changed, % [95 %]"): show.share("continuations_changed", "prompts"),
        ("next token", "positions"): "positions d",
        ("next token", "changed, % [95 %]"): show.share("tokens_changed", "positions"),
        ("next token", "by merging, % [95 %]"): show.share("unmerged_changed", "positions"),
        ("nats", "max |Δ log p|"): "difference .1e",
        ("nats", "lead"): "widest_gap .1e",
    }
    title = "Merged, as GGUF in llama.cpp"
    return show.Page([show.table("gguf", title, report["cases"], columns, *remarks)], title)


main = partial(run, "serving.gguf_engine", parse, measure, "gguf", page)

if __name__ == "__main__":
    main()
