"""Measure what merging changes, for every method that merges; the last line is JSON.

    python -m benchmarks.merging.error --results results/merging
    python -m benchmarks.merging.error --backbone tiny-llama --only lora furina --dtypes float32

An adapter is freshly made and every entry of it moved by noise, so that each linear's ‖ΔW‖/‖W‖ is
--update; it is the same adapter in every dtype. Weights are compared with W + ΔW in float64, logits
with those of the same weights and adapter, unmerged, in float64. Greedy tokens are compared at
every position of the same texts, so one change does not bring about others.

The yardstick of a changed token or answer is how many the same unmerged model changes in the same
dtype between batch size 1 and --batch-size. Two models stand side by side for a quantised base: the
adapter beside a quantised W, and W + ΔW quantised after merging.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import furina
from benchmarks.common.command import Parser, Report, described, run
from benchmarks.common.models import adapt, method_options, perturb, relative_update
from benchmarks.common.rounds import Failed, fail
from benchmarks.merging import measures, page
from benchmarks.merging.measures import Answers, Asked
from benchmarks.merging.quantised import quantise_cases
from furina.backbones.load import backbone_hash
from furina.errors import FurinaError
from furina.model.state import state_of

WIDEST = "float32"
"""Its unmerged answers are what the other dtypes' are compared with, and it is quantised."""


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    shared = "backbone device rank experts threads seed results"
    made = Parser(__doc__, shared, device="cpu")
    dtypes = [WIDEST, "bfloat16", "float16"]
    made.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes)
    made.add_argument("--only", nargs="+", help="methods; all that merge by default")
    made.add_argument("--update", type=float, default=0.05, help="‖ΔW‖/‖W‖ of each linear")
    made.add_argument("--task", default="arc_easy", help="whose test questions are asked")
    made.add_argument("--data-dir", type=Path, help="folder of the questions")
    made.add_argument("--items", type=int, default=100, help="questions")
    made.add_argument("--sequences", type=int, default=16, help="of them read token by token")
    made.add_argument("--batch-size", type=int, default=8, help="compared with 1")
    made.add_argument("--cycles", type=int, default=100, help="of merging and unmerging")
    made.add_argument("--cycle-linears", type=int, default=7, help="the first ones; 0 for all")
    made.add_argument("--bits", nargs="*", type=int, default=[8, 4], help="of a quantised base")
    made.add_argument("--group", type=int, default=32, help="weights that share a scale")
    counts = "items sequences cycles group rank experts threads"
    options = made.checked(arguments, counts, batch_size=2, cycle_linears=0)
    if options.update <= 0:
        made.error("--update must be larger than 0")
    if any(not 2 <= bits <= 8 for bits in options.bits):
        made.error("--bits must be 2 to 8")
    return options


def select(only: Sequence[str] | None, options: Namespace) -> list[str]:
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

    options: Namespace
    asked: Asked
    backbones: dict[str, Any]
    data: Report
    pristine: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    base_right: dict[str, int] = field(default_factory=dict)

    @property
    def sequences(self) -> list[list[int]]:
        """The texts that are read token by token."""
        return self.asked.sequences[: self.options.sequences]


def prepare(options: Namespace) -> Setup:
    """Load questions and backbones; raises FurinaError where one is not there."""
    torch.set_num_threads(options.threads)
    asked, data = measures.ask(options, options.items, options.data_dir)
    backbones = {
        dtype: furina.load_backbone(options.backbone, dtype, options.device)
        for dtype in sorted(dict.fromkeys(options.dtypes), key=WIDEST.__ne__)
    }
    setup = Setup(options, asked, backbones, data)
    for dtype, model in backbones.items():
        setup.pristine[dtype] = measures.snapshot(model.state_dict())
        found = measures.answer(model, asked, options.batch_size)
        setup.base_right[dtype] = measures.right(found, asked)
    return setup


@contextlib.contextmanager
def adapted(
    method: str, model: Any, adapter: dict[str, Tensor], setup: Setup, targets: Any = None
) -> Iterator[None]:
    """Put the adapter in for a while; perturbed, and kept in `adapter`, if that is empty."""
    options = setup.options
    adapt(model, method, options, targets=targets)
    try:
        if not adapter:
            perturb(model, options.update, options.seed)
            adapter |= measures.snapshot(furina.adapter_state_dict(model))
        wanted = furina.adapter_state_dict(model).keys()
        furina.load_adapter_state_dict(model, {name: adapter[name] for name in wanted})
        yield
    finally:
        furina.remove(model)


def case(
    method: str, dtype: str, adapter: dict[str, Tensor], setup: Setup
) -> tuple[Report, Answers]:
    """Measure one method in one dtype; return the numbers and the unmerged answers."""
    model, options = setup.backbones[dtype], setup.options
    with adapted(method, model, adapter, setup):
        names = list(state_of(model).layers)
        found: Report = {"method": method, "dtype": dtype, "linears": len(names)}
        found["relative_update"] = relative_update(model)
        exact = measures.exact_logits(model, setup.sequences, options.batch_size)
        answers = merge_once(model, exact, setup, found)
        if dtype == WIDEST:
            every, read = options.bits, (setup.sequences, options.batch_size)
            found["quantised"] = quantise_cases(model, exact, every, options.group, read)
    with adapted(method, model, adapter, setup, names[: options.cycle_linears or None]):
        found["drift"] = measures.drift(model, options.cycles)
    found["bytes_after_removal"] = measures.differing_bytes(
        setup.pristine[dtype], model.state_dict()
    )
    return found, answers


def merge_once(model: Any, exact: Tensor, setup: Setup, found: Report) -> Answers:
    """Compare merged with unmerged, and that with itself in batches; fill in `found`."""
    asked, sequences, size = setup.asked, setup.sequences, setup.options.batch_size
    unmerged, alone = (measures.logits(model, sequences, rows) for rows in (size, 1))
    answers, answers_alone = (measures.answer(model, asked, rows) for rows in (size, 1))
    furina.merge(model)
    found["weights"] = measures.rounding(model)
    merged = measures.logits(model, sequences, size)
    answers_merged = measures.answer(model, asked, size)
    furina.unmerge(model)
    compared = {
        "merged": (merged, unmerged),
        "batch": (unmerged, alone),
        "merged_exact": (merged, exact),
        "unmerged_exact": (unmerged, exact),
    }
    found["logits"] = {
        name: measures.logit_difference(*pair, exact) for name, pair in compared.items()
    }
    found["answers"] = {
        "n": len(answers.chosen),
        "merged": measures.flips(answers_merged, answers),
        "batch": measures.flips(answers, answers_alone),
        "right_base": setup.base_right[found["dtype"]],
        "right_unmerged": measures.right(answers, asked),
        "right_merged": measures.right(answers_merged, asked),
        "loglikelihood_merged": measures.loglikelihood_change(answers_merged, answers),
        "loglikelihood_batch": measures.loglikelihood_change(answers, answers_alone),
    }
    found["chosen"] = {"unmerged": answers.chosen, "merged": answers_merged.chosen}
    return answers


def all_cases(setup: Setup) -> tuple[list[Report], Failed]:
    """Measure every method in every dtype; return the cases, and why others have no numbers."""
    cases: list[Report] = []
    failed: Failed = {}
    for method in select(setup.options.only, setup.options):
        adapter: dict[str, Tensor] = {}
        widest: Answers | None = None
        for dtype in setup.backbones:
            try:
                found, answers = case(method, dtype, adapter, setup)
            except (FurinaError, RuntimeError) as error:
                fail(failed, f"{method}/{dtype}", str(error))
                continue
            widest = answers if dtype == WIDEST else widest
            if widest is not None:
                found["answers"] |= {
                    f"{name}_widest": sum(a != b for a, b in zip(own, widest.chosen, strict=True))
                    for name, own in found["chosen"].items()
                }
            cases.append(found)
            print(f"{method} in {dtype}: {found['answers']}", flush=True)
    return cases, failed


def measure(options: Namespace, command: str) -> Report:
    """Measure what the options ask for; return the report."""
    select(options.only, options)  # a misspelt name is told before anything is loaded
    setup = prepare(options)
    cases, failed = all_cases(setup)
    return {
        **described(options, command),
        "data": setup.data,
        "backbones": {dtype: backbone_hash(model) for dtype, model in setup.backbones.items()},
        "cases": cases,
        "ratios": page.ratios(cases),
        "failed": failed,
    }


main = partial(run, "merging.error", parse, measure, "merging", page.page)

if __name__ == "__main__":
    main()
