"""Measure what merging changes, for every method that merges; the last line is JSON.

    python benchmarks/merge_error.py --results results/merging
    python benchmarks/merge_error.py --backbone tiny-llama --only lora furina --dtypes float32

An adapter is freshly made and every entry of it moved by noise, so that each linear's ‖ΔW‖/‖W‖ is
--update; it is the same adapter in every dtype. Weights are compared with W + ΔW in float64, logits
with those of the same weights and adapter, unmerged, in float64. Greedy tokens are compared at
every position of the same texts, so one change does not bring about others.

The yardstick of a changed token or answer is how many the same unmerged model changes in the same
dtype between batch size 1 and --batch-size. Two models stand side by side for a quantised base: the
adapter beside a quantised W, and W + ΔW quantised after merging.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import merge_points as points
import merge_report
import torch
from command_line import command_line, device
from merge_points import Answers, Asked
from merge_quantised import quantise_cases
from torch import Tensor
from training_variants import method_options

import furina
from furina.backbones.load import backbone_hash
from furina.data.items import data_hash
from furina.data.sources import load_items
from furina.data.splits import test_subset
from furina.errors import FurinaError
from furina.model.state import state_of
from furina.records.environment import provenance

WIDEST = "float32"
"""Its unmerged answers are what the other dtypes' are compared with, and it is quantised."""
Json = dict[str, Any]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="smollm2-135m-instruct", help="asset, folder or name")
    dtypes = [WIDEST, "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--only", nargs="+", help="methods; all that merge by default")
    parser.add_argument("--rank", type=int, default=128, help="of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--update", type=float, default=0.05, help="‖ΔW‖/‖W‖ of each linear")
    parser.add_argument("--task", default="arc_easy", help="whose test questions are asked")
    parser.add_argument("--data-dir", type=Path, help="folder of the questions")
    parser.add_argument("--items", type=int, default=100, help="questions")
    parser.add_argument("--sequences", type=int, default=16, help="of them read token by token")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--cycles", type=int, default=100, help="of merging and unmerging")
    parser.add_argument("--cycle-linears", type=int, default=7, help="the first ones; 0 for all")
    parser.add_argument("--bits", nargs="*", type=int, default=[8, 4], help="of a quantised base")
    parser.add_argument("--group", type=int, default=32, help="weights that share a scale")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="folder for merging.json and merging.md")
    parser.set_defaults(dropout=0.0)
    options = parser.parse_args(arguments)
    least = ("items", "sequences", "cycles", "group", "rank", "experts", "threads")
    for name in least:
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if options.batch_size < 2:
        parser.error("--batch-size must be at least 2: it is compared with 1")
    if options.cycle_linears < 0 or options.update <= 0:
        parser.error("--cycle-linears must not be negative, and --update be larger than 0")
    if any(not 2 <= bits <= 8 for bits in options.bits):
        parser.error("--bits must be 2 to 8")
    if options.rank % options.experts:
        parser.error("--experts must divide --rank")
    return options


def select(only: Sequence[str] | None, options: argparse.Namespace) -> list[str]:
    """Return the methods to measure; raises FurinaError where a word names none that merges."""
    merging = [
        name
        for name in furina.methods()
        if furina.configure(name, method_options(name, options)).mergeability().ok
    ]
    if unknown := sorted(set(only or ()) - set(merging)):
        raise FurinaError(
            f"No method that merges is called {', '.join(unknown)}; choose of {', '.join(merging)}."
        )
    return [name for name in merging if only is None or name in only]


@dataclass
class Setup:
    """What all cases share: questions, a backbone per dtype with its bytes, and base accuracies."""

    options: argparse.Namespace
    asked: Asked
    backbones: dict[str, Any]
    data: Json
    pristine: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base_right: dict[str, int] = field(default_factory=dict)

    @property
    def sequences(self) -> list[list[int]]:
        """The texts that are read token by token."""
        return self.asked.sequences[: self.options.sequences]


def prepare(options: argparse.Namespace) -> Setup:
    """Load questions and backbones; raises FurinaError where one is not there."""
    torch.set_num_threads(options.threads)
    items = load_items(options.task, "test", data_dir=options.data_dir)
    name, questions = test_subset(items, min(options.items, len(items)), options.seed)
    asked = points.ask(furina.load_tokenizer(options.backbone), options.task, questions)
    backbones = {
        dtype: furina.load_backbone(options.backbone, dtype, options.device)
        for dtype in sorted(dict.fromkeys(options.dtypes), key=WIDEST.__ne__)
    }
    data = {"task": options.task, "subset": name, "sha256": data_hash(questions)}
    setup = Setup(options, asked, backbones, data)
    for dtype, model in backbones.items():
        setup.pristine[dtype] = points.snapshot(model.state_dict())
        found = points.answer(model, asked, options.batch_size)
        setup.base_right[dtype] = points.right(found, asked)
    return setup


@contextlib.contextmanager
def adapted(
    method: str, model: Any, adapter: dict[str, Tensor], setup: Setup, targets: Any = None
) -> Iterator[None]:
    """Put the adapter in for a while; perturbed, and kept in `adapter`, if that is empty."""
    options = setup.options
    chosen = method_options(method, options)
    furina.adapt(model, method, targets=targets, seed=options.seed, **chosen)
    try:
        if not adapter:
            points.perturb(model, options.update, options.seed)
            adapter |= points.snapshot(furina.adapter_state_dict(model))
        wanted = furina.adapter_state_dict(model).keys()
        furina.load_adapter_state_dict(model, {name: adapter[name] for name in wanted})
        yield
    finally:
        furina.remove(model)


def case(method: str, dtype: str, adapter: dict[str, Tensor], setup: Setup) -> tuple[Json, Answers]:
    """Measure one method in one dtype; return the numbers and the unmerged answers."""
    model, options = setup.backbones[dtype], setup.options
    with adapted(method, model, adapter, setup):
        names = list(state_of(model).layers)
        found: Json = {"method": method, "dtype": dtype, "linears": len(names)}
        found["relative_update"] = points.relative_update(model)
        exact = points.exact_logits(model, setup.sequences, options.batch_size)
        answers = merge_once(model, exact, setup, found)
        if dtype == WIDEST:
            every, read = options.bits, (setup.sequences, options.batch_size)
            found["quantised"] = quantise_cases(model, exact, every, options.group, read)
    with adapted(method, model, adapter, setup, names[: options.cycle_linears or None]):
        found["drift"] = asdict(points.drift(model, options.cycles))
    found["bytes_after_removal"] = points.differing_bytes(setup.pristine[dtype], model.state_dict())
    return found, answers


def merge_once(model: Any, exact: Tensor, setup: Setup, found: Json) -> Answers:
    """Compare merged with unmerged, and that with itself in batches; fill in `found`."""
    asked, sequences, size = setup.asked, setup.sequences, setup.options.batch_size
    unmerged, alone = (points.logits(model, sequences, rows) for rows in (size, 1))
    answers, answers_alone = (points.answer(model, asked, rows) for rows in (size, 1))
    furina.merge(model)
    found["weights"] = asdict(points.rounding(model))
    merged = points.logits(model, sequences, size)
    answers_merged = points.answer(model, asked, size)
    furina.unmerge(model)
    compared = {
        "merged": (merged, unmerged),
        "batch": (unmerged, alone),
        "merged_exact": (merged, exact),
        "unmerged_exact": (unmerged, exact),
    }
    found["logits"] = {
        name: asdict(points.logit_difference(*pair, exact)) for name, pair in compared.items()
    }
    found["answers"] = {
        "n": len(answers.chosen),
        "merged": points.flips(answers_merged, answers),
        "batch": points.flips(answers, answers_alone),
        "right_base": setup.base_right[found["dtype"]],
        "right_unmerged": points.right(answers, asked),
        "right_merged": points.right(answers_merged, asked),
        "loglikelihood_merged": points.loglikelihood_change(answers_merged, answers),
        "loglikelihood_batch": points.loglikelihood_change(answers, answers_alone),
    }
    found["chosen"] = {"unmerged": answers.chosen, "merged": answers_merged.chosen}
    return answers


def all_cases(setup: Setup) -> tuple[list[Json], dict[str, str]]:
    """Measure every method in every dtype; return the cases, and why others have no numbers."""
    cases: list[Json] = []
    failed: dict[str, str] = {}
    for method in select(setup.options.only, setup.options):
        adapter: dict[str, Tensor] = {}
        widest: Answers | None = None
        for dtype in setup.backbones:
            try:
                found, answers = case(method, dtype, adapter, setup)
            except (FurinaError, RuntimeError) as error:
                failed[f"{method}/{dtype}"] = str(error)
                print(f"{method} {dtype}: failed: {error}", flush=True)
                continue
            widest = answers if dtype == WIDEST else widest
            if widest is not None:
                found["answers"] |= {
                    f"{name}_widest": sum(a != b for a, b in zip(own, widest.chosen, strict=True))
                    for name, own in found["chosen"].items()
                }
            cases.append(found)
            print(merge_report.line(found), flush=True)
    return cases, failed


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> Json:
    """Measure what the options ask for; return the report."""
    select(options.only, options)  # a misspelt name is told before anything is loaded
    setup = prepare(options)
    cases, failed = all_cases(setup)
    hidden = ("results", "data_dir", "dropout")
    return {
        "settings": {key: value for key, value in vars(options).items() if key not in hidden},
        "environment": asdict(provenance()),
        "command": command_line("merge_error.py", arguments),
        "data": setup.data,
        "backbones": {dtype: backbone_hash(model) for dtype, model in setup.backbones.items()},
        "cases": cases,
        "ratios": merge_report.ratios(cases),
        "failed": failed,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(arguments)
    try:
        report = measure(options, arguments)
        if options.results:
            merge_report.write(report, options.results)
    except FurinaError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
