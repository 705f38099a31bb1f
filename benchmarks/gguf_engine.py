"""Merge, convert to GGUF, run in llama.cpp, compare with transformers; the last line is JSON.

    make gguf
    python benchmarks/gguf_engine.py --results results/merging

A perturbed or a saved adapter is merged and exported as a plain folder, which llama.cpp's own
converter turns into GGUF. transformers and llama.cpp get the same token ids. Compared are whole
greedy continuations, and the next token after every beginning of the same text, where one change
does not bring about others. The yardstick is what merging alone changes inside transformers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import merge_points as points
import torch
from command_line import command_line
from merge_report import changed_ratio, wilson
from torch import Tensor
from training_variants import method_options

import furina
from furina.data.items import data_hash
from furina.data.sources import load_items
from furina.data.splits import test_subset
from furina.errors import FurinaError
from furina.records.environment import provenance
from furina.reporting.tables.cells import Cell, Row, build, label
from furina.reporting.tables.render import markdown as render
from furina.storage import write_json, write_text

WORKER = Path(__file__).with_name("gguf_worker.py")
ENVIRONMENT = Path(__file__).parents[1] / ".venv-gguf"
KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
Json = dict[str, Any]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    parser.add_argument("--dtypes", nargs="+", choices=KINDS, default=["float32", "bfloat16"])
    parser.add_argument("--method", default="furina", help="of the perturbed adapter")
    parser.add_argument("--adapter-path", type=Path, help="a saved adapter instead")
    parser.add_argument("--rank", type=int, default=128, help="of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--update", type=float, default=0.05, help="‖ΔW‖/‖W‖ of each linear")
    parser.add_argument("--task", default="arc_easy", help="whose test questions are the prompts")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=24, help="after each prompt")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="made by make gguf")
    parser.add_argument("--results", type=Path, help="folder for gguf.json and gguf.md")
    parser.set_defaults(dropout=0.0)
    options = parser.parse_args(arguments)
    for name in ("rank", "experts", "prompts", "new_tokens", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return options


def engine(environment: Path, *words: str, questions: Json | None = None) -> Json:
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
    return json.loads(done.stdout.splitlines()[-1]) if questions else {}


def prompts(options: argparse.Namespace) -> tuple[list[list[int]], Json]:
    """Return the prompts' ids, and where they are from."""
    items = load_items(options.task, "test")
    name, questions = test_subset(items, min(options.prompts, len(items)), options.seed)
    asked = points.ask(furina.load_tokenizer(options.backbone), options.task, questions)
    data = {"task": options.task, "subset": name, "sha256": data_hash(questions)}
    return [pairs[0][0] for pairs in asked.choices], data


def adapted(dtype: str, options: argparse.Namespace) -> Any:
    """Return the backbone with the saved or a perturbed adapter, unmerged."""
    model = furina.load_backbone(options.backbone, dtype)
    if options.adapter_path:
        return furina.load(options.adapter_path, model)
    chosen = method_options(options.method, options)
    furina.adapt(model, options.method, seed=options.seed, **chosen)
    points.perturb(model, options.update, options.seed)
    return model


@torch.inference_mode()
def generate(model: Any, ids: Sequence[int], new_tokens: int) -> list[int]:
    """Return transformers' greedy continuation, which does not stop early."""
    whole = torch.tensor([list(ids)])
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    made = model.generate(whole, attention_mask=torch.ones_like(whole), **settings)
    return made[0, len(ids) :].tolist()


def forced(model: Any, texts: Sequence[list[int]], new_tokens: int) -> list[Tensor]:
    """Return log-probabilities of each next token, at the beginnings that the worker uses, too.

    Shape: (new_tokens, V) for each text.
    """
    found = (points.logits(model, [text], 1)[-new_tokens - 1 : -1] for text in texts)
    return [logits.float().log_softmax(-1) for logits in found]


def case(dtype: str, asked: list[list[int]], options: argparse.Namespace) -> Json:
    """Compare llama.cpp with transformers in one dtype."""
    new, kind = options.new_tokens, KINDS[dtype]
    model = adapted(dtype, options)
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


def compare(own: list[list[int]], ours: list[Tensor], answers: Json) -> Json:
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


def ratios(cases: Sequence[Json], name: str) -> dict[str, float]:
    """Return what llama.cpp changes over what merging changes, half a token added to each."""
    return {
        f"tokens/{name}/{case['dtype']}/gguf_over_merging": changed_ratio(
            case["tokens_changed"], case["unmerged_changed"]
        )
        for case in cases
    }


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Json:
    """Measure what the options ask for; return the report."""
    torch.set_num_threads(options.threads)
    asked, data = prompts(options)
    cases = [case(dtype, asked, options) for dtype in dict.fromkeys(options.dtypes)]
    name = "adapter" if options.adapter_path else options.method
    environment = asdict(provenance())
    environment["engine"] = cases[0]["versions"]
    hidden = ("results", "environment", "adapter_path", "dropout")
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in hidden},
        "environment": environment,
        "command": command_line("gguf_engine.py", arguments),
        "data": data,
        "cases": [{k: v for k, v in found.items() if k != "versions"} for found in cases],
        "ratios": ratios(cases, name),
    }


def markdown(report: Json) -> str:
    """Return the report's table."""
    settings, environment = report["settings"], report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["engine"].items())
    changed = " with uncommitted changes" if environment["dirty"] else ""
    remarks = (
        "A merged model's folder, converted to GGUF of the same dtype, against transformers on "
        f"that folder. Whole: greedy continuations of {settings['new_tokens']} tokens that differ "
        "anywhere. Next token: after every beginning of transformers' own text; merging is merged "
        "against unmerged there, in transformers. Of llama.cpp's token max |Δ log p| is the "
        "largest difference, and lead how far it was at most behind transformers' own.",
        f"{settings['backbone']}, {report['data']['task']} {report['data']['subset']}. {versions}; "
        f"commit {(environment['commit'] or 'unknown')[:10]}{changed}. Made by "
        f"{report['command']}.",
    )
    rows = [_row(found) for found in report["cases"]]
    table = build("gguf", "Merged, as GGUF in llama.cpp", rows, remarks)
    return f"# {table.title}\n\n{render(table)}"


def _row(found: Json) -> Row:
    n = found["positions"]
    return {
        ("", "dtype"): label(found["dtype"]),
        ("whole", "prompts"): Cell(str(found["prompts"]), {"": found["prompts"]}),
        ("whole", "changed, % [95 %]"): _share(found["continuations_changed"], found["prompts"]),
        ("next token", "positions"): Cell(str(n), {"": n}),
        ("next token", "changed, % [95 %]"): _share(found["tokens_changed"], n),
        ("next token", "by merging, % [95 %]"): _share(found["unmerged_changed"], n),
        ("nats", "max |Δ log p|"): Cell(f"{found['difference']:.1e}", {"": found["difference"]}),
        ("nats", "lead"): Cell(f"{found['widest_gap']:.1e}", {"": found["widest_gap"]}),
    }


def _share(count: int, n: int) -> Cell:
    low, high = wilson(count, n)
    return Cell(f"{100 * count / n:.2f} [{100 * low:.2f}, {100 * high:.2f}]", {"": count / n})


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        report = measure(options, arguments)
        if options.results:
            write_json(options.results / "gguf.json", report)
            write_text(options.results / "gguf.md", markdown(report))
    except FurinaError as error:
        sys.exit(f"error: {error}")
    print(markdown(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
