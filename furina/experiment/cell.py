"""One cell of a table: fine-tune, score unmerged, merge, score merged, time, record.

Each finished part is kept in the run's folder, so a killed cell repeats only the part it was in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from furina.analysis import TaskItems, analyse
from furina.backbones.load import backbone_hash, load_backbone
from furina.data.encoding import Encoder
from furina.data.items import Item, data_hash
from furina.data.protocols import get_protocol
from furina.data.sources import load_items, resolve_source
from furina.data.splits import test_subset, warn_overlap
from furina.data.tasks import get_task
from furina.evaluation.evaluate import evaluate
from furina.evaluation.latency import measure_latency
from furina.evaluation.samples import read_samples
from furina.experiment.config import RunConfig
from furina.experiment.fit import Fitted, claim, fit, read_kept
from furina.experiment.process import load_untouched
from furina.model.inference import evaluation_mode
from furina.model.merging import MergeReport, merge, unmerge
from furina.model.router_removal import without_router
from furina.model.state import state_of
from furina.progress import part
from furina.records import (
    Backbone,
    Data,
    Latency,
    Merge,
    RunRecord,
    Score,
    Variant,
    codec,
    provenance,
    reset_peak_memory,
    timestamp,
)
from furina.records.cells import ACTIVITY
from furina.storage import write_json
from furina.training import DivergedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

K = TypeVar("K", Score, Latency)
PROBES = 8
"""Test prompts on which merged and unmerged logits are compared."""


class TestSet(NamedTuple):
    """A task's named items that are scored, and the protocol that asks them."""

    task: str
    protocol: str
    name: str
    items: list[Item]


def run_cell(config: RunConfig, run_dir: Path, command: str) -> RunRecord:
    """Run one cell in `run_dir` and return its record, whose samples are files there.

    The record names the dtype that "auto" stood for, and says so if the run diverged. A resumed run
    counts from its first start, since the code of that time made the parts that it kept.
    """
    config = config.resolved()
    config.check_tasks()
    started = timestamp()
    reset_peak_memory()
    tests = _test_sets(config)
    claim(config, run_dir)
    begun = run_dir / "begun.json"
    if not begun.exists():
        write_json(begun, {"started": started})
    started = str(read_kept(begun, dict)["started"])
    backbone = _backbone(config.backbone, config.dtype)
    fitted = None
    try:
        if config.is_base:
            model, tokenizer = load_untouched(config)
        else:
            fitted = fit(config, run_dir)
            model, tokenizer = fitted.model, fitted.tokenizer
    except DivergedError as error:
        data = _data(config, tests, None)
        told = {"data": data, "status": "diverged", "error": str(error)}
        return _record(config, command, started, backbone, **told)
    if fitted is not None:
        for test in tests:
            trained = fitted.data.train_items.get(test.task, [])
            warn_overlap(trained, test.items, test.task)
    subject = Subject(config, run_dir, tests, model, tokenizer)
    scores, merged = subject.score_and_merge()
    latency = subject.latency() if config.latency_rounds else ()
    if config.activity_items:
        subject.analyse(backbone)
    if config.score_without_router:  # last, since the trained mixture is gone then
        without_router(model)
        scores += subject.scores("router_removed")
    return _record(
        config,
        command,
        started,
        backbone,
        data=_data(config, tests, fitted),
        training=fitted and fitted.training,
        evaluations=scores,
        merge=merged,
        latency=latency,
    )


def failed_cell(config: RunConfig, command: str, started: str, error: str) -> RunRecord:
    """Return the record of a cell that failed and has no numbers."""
    backbone = Backbone(config.backbone, "")
    return _record(config.resolved(), command, started, backbone, status="failed", error=error)


@part("loading the test items")
def _test_sets(config: RunConfig) -> tuple[TestSet, ...]:
    sets = []
    for task, protocol in config.scored:
        items = load_items(task, "test", config.source, config.data_dir)
        size = config.test_size
        whole = size is None or size >= len(items)  # the record then says "full"
        subset = test_subset(items, None if whole else size, config.test_seed)
        sets.append(TestSet(task, protocol, *subset))
    return tuple(sets)


@dataclass(frozen=True)
class Subject:
    """A model under test: what is measured on it, once each, and kept in `run_dir`."""

    config: RunConfig
    run_dir: Path
    tests: tuple[TestSet, ...]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def score_and_merge(self) -> tuple[tuple[Score, ...], Merge | None]:
        """Score the model as it is and, if its method merges, score the merged model as well."""
        if self.config.is_base:
            return self.scores("base"), None
        unmerged = self.scores("unmerged")
        if not state_of(self.model).config.mergeability().ok:
            return unmerged, None
        with part("merging"):
            before = self._logits()
            report = merge(self.model)
            after = self._logits()
        merged = self.scores("merged")
        unmerge(self.model)
        changed = sum(
            one != other
            for pair in zip(self._predictions(unmerged), self._predictions(merged), strict=True)
            for one, other in zip(*pair, strict=True)
        )
        return unmerged + merged, _merge_record(report, after - before, changed)

    def scores(self, variant: Variant) -> tuple[Score, ...]:
        """Score every test set."""
        return tuple(score for test in self.tests for score in self._scores(test, variant))

    def _scores(self, test: TestSet, variant: Variant) -> tuple[Score, ...]:
        label = f"{test.task}-{test.protocol}"
        samples = f"samples-{label}--{variant}.jsonl.gz"

        def score() -> tuple[Score, ...]:
            with part(f"scoring {variant} on {test.task}"):
                evaluation = evaluate(
                    self.model,
                    self.tokenizer,
                    test.task,
                    test.items,
                    test.protocol,
                    batch_size=self.config.eval_batch_size,
                    engine=self.config.engine,
                    execute_code=self.config.execute_code,
                )
            evaluation.write_samples(self.run_dir / samples)
            return evaluation.to_records(variant, samples)

        finished = self.run_dir / f"scores-{label}-{variant}.json"
        if not (self.run_dir / samples).exists():
            finished.unlink(missing_ok=True)
        return _kept(Score, finished, score)

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        """Return the last position's logits of the first prompts. Shape: (probes, vocabulary)."""
        test, model, rows = self.tests[0], self.model, []
        task, protocol = get_task(test.task), get_protocol(test.protocol)
        encoder = Encoder(self.tokenizer)
        with evaluation_mode(model):
            for item in test.items[:PROBES]:
                prompt = protocol.context(task, item) if protocol.trains else item.asked
                ids = torch.tensor([encoder.encode(prompt)], device=model.device)
                rows.append(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1])
        return torch.stack(rows).float()

    def _predictions(self, scores: Iterable[Score]) -> list[list[int | str | None]]:
        """Return the answers to each test set, by its main metric, which is the first."""
        main = {str(score.samples): score.metric for score in reversed([*scores])}
        return [
            [sample.prediction[metric] for sample in read_samples(self.run_dir / file)]
            for file, metric in sorted(main.items())
        ]

    def latency(self) -> tuple[Latency, ...]:
        """Time the variants of the model."""

        def time() -> tuple[Latency, ...]:
            with part("timing"):
                timed = measure_latency(
                    self.model,
                    rounds=self.config.latency_rounds,
                    warmup=self.config.latency_warmup,
                )
            return tuple(each.to_record(codec.decode(Variant, each.variant, "")) for each in timed)

        return _kept(Latency, self.run_dir / "latency.json", time)

    def analyse(self, backbone: Backbone) -> None:
        """Look at the experts' activity on `activity_items` of each task.

        Raises ConfigurationError if the method has no experts to select from.
        """
        file = self.run_dir / ACTIVITY
        if file.exists():
            return
        with part("analysing the experts"):
            record = analyse(
                self.model,
                self.tokenizer,
                {test.task: TaskItems(test.protocol, test.items) for test in self.tests},
                backbone=backbone,
                size=self.config.activity_items,
                subset_seed=self.config.test_seed,
                batch_size=self.config.eval_batch_size,
                max_length=self.config.max_length,
            )
        record.write(file)


def _kept(kind: type[K], file: Path, measure: Callable[[], tuple[K, ...]]) -> tuple[K, ...]:
    """Return what a file keeps, measured now if there is none."""
    if not file.exists():
        write_json(file, [asdict(each) for each in measure()])
    return tuple(codec.decode(kind, each, str(file)) for each in read_kept(file, list))


def _merge_record(report: MergeReport, difference: Tensor, changed: int) -> Merge:
    return Merge(
        num_merged=report.num_merged,
        max_abs_delta=report.max_abs_delta,
        relative_delta=report.relative_delta,
        logits_max_difference=difference.abs().max().item(),
        logits_rms_difference=difference.square().mean().sqrt().item(),
        answers_changed=changed,
    )


def _record(
    config: RunConfig, command: str, started: str, backbone: Backbone, **measured: Any
) -> RunRecord:
    """Return a record of a run that ends now; what was not measured is empty."""
    empty = {"data": (), "training": None, "evaluations": (), "merge": None, "latency": ()}
    return RunRecord(
        suite=config.suite,
        name=config.name,
        method=config.method,
        task=config.task,
        seed=config.seed,
        config=config.to_dict(),
        command=command,
        started=started,
        finished=timestamp(),
        provenance=provenance(),
        backbone=backbone,
        **{**empty, **measured},
    )


def _data(config: RunConfig, tests: tuple[TestSet, ...], fitted: Fitted | None) -> tuple[Data, ...]:
    """Describe the rows of every task that was trained or scored."""
    train = fitted.data.train_items if fitted else {}
    validation = fitted.data.validation_items if fitted else {}
    scored = {test.task: test for test in tests}

    def digest(rows: list[Item] | None) -> str | None:
        return data_hash(rows) if rows else None

    return tuple(
        Data(
            task=task,
            source=resolve_source(config.source, config.data_dir),
            train_sha256=digest(train.get(task)),
            validation_sha256=digest(validation.get(task)),
            test_sha256=digest(scored[task].items) if task in scored else None,
            test_subset=scored[task].name if task in scored else None,
        )
        for task in dict.fromkeys([*train, *scored])
    )


@cache
@part("loading and hashing the backbone")
def _backbone(name: str, dtype: str) -> Backbone:
    """Describe the backbone as it is loaded, before an adapter changes it."""
    return Backbone(name, backbone_hash(load_backbone(name, dtype)))
