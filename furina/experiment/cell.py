"""One cell of a table: fine-tune, score unmerged, merge, score merged, time, record.

Each finished part is kept in the run's folder, so a killed cell repeats only the part it was in.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from furina.analysis import TaskItems
from furina.backbones.load import backbone_hash, load_backbone, load_tokenizer
from furina.data.encoding import Encoder
from furina.data.items import Item, data_hash
from furina.data.protocols import get_protocol
from furina.data.sources import load_items, resolve_source
from furina.data.splits import test_subset, warn_overlap
from furina.data.tasks import get_task
from furina.evaluation.evaluate import evaluate
from furina.evaluation.latency import measure_latency
from furina.evaluation.samples import read_samples
from furina.experiment.activity import publish_activity, record_activity
from furina.experiment.config import RunConfig
from furina.experiment.fit import Fitted, claim, fit, read_kept
from furina.kernels.processor import best_device
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
    Status,
    Variant,
    codec,
    provenance,
    reset_peak_memory,
    timestamp,
)
from furina.storage import remove_leftovers, write_bytes, write_json
from furina.training import DivergedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBES = 8
"""Test prompts on which merged and unmerged logits are compared."""
SAMPLES = "samples-"
"""How the files of per-question outputs in a run's folder begin."""


class Subject(NamedTuple):
    """A model under test, and what it was fitted on if it was."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fitted: Fitted | None


class TestSet(NamedTuple):
    """A task's named items that are scored, and the protocol that asks them."""

    task: str
    protocol: str
    name: str
    items: list[Item]

    @property
    def label(self) -> str:
        """Return what its files are called."""
        return f"{self.task}-{self.protocol}"


def run_cell(config: RunConfig, run_dir: Path, command: str) -> RunRecord:
    """Run one cell in `run_dir` and return its record, whose samples are files there.

    The record says the dtype that "auto" stood for, and of a run that diverges that it did. One
    that was killed counts from its first start: what it has kept was made by the code of then.
    """
    config = config.resolved()
    config.check_tasks()
    started = timestamp()
    reset_peak_memory()
    tests = _test_sets(config)
    claim(config, run_dir)
    started = _begun(run_dir, started)
    backbone = _backbone(config.backbone, config.dtype)
    record = partial(_record, config, command, started, backbone, tests)
    try:
        subject = _subject(config, run_dir)
    except DivergedError as error:
        return record(None, status="diverged", error=str(error))
    if subject.fitted is not None:
        trained = subject.fitted.data.train_items
        for test in tests:
            warn_overlap(trained.get(test.task, []), test.items, test.task)
    scores, merged = _measure(config, subject, tests, run_dir)
    latency = _latency(config, subject, run_dir)
    asked = {test.task: TaskItems(test.protocol, test.items) for test in tests}
    record_activity(config, subject.model, subject.tokenizer, asked, backbone, run_dir)
    if config.score_without_router:  # last, since the trained mixture is gone then
        without_router(subject.model)
        scores += _score_all(config, subject, tests, run_dir, "router_removed")
    return record(subject.fitted, scores=scores, merged=merged, latency=latency)


def _begun(run_dir: Path, now: str) -> str:
    """Return when a cell was started first: now, unless it was before."""
    file = run_dir / "begun.json"
    if not file.exists():
        write_json(file, {"started": now})
    return str(read_kept(file, dict)["started"])


def failed_cell(config: RunConfig, command: str, started: str, error: str) -> RunRecord:
    """Return the record of a cell that no number came out of."""
    unknown = Backbone(config.backbone, "")
    return _record(
        config.resolved(), command, started, unknown, (), None, status="failed", error=error
    )


def publish(
    record: RunRecord, config: RunConfig, command: str, run_dir: Path, results_dir: Path
) -> Path:
    """Write a finished cell's record and samples under a suite's names; returns the record's file.

    Suites share cells: `config` may differ from the record's in suite and row, and in nothing else.
    """
    scores = []
    for score in record.evaluations:
        assert score.samples is not None
        name = f"samples/{config.name}--{score.samples.removeprefix(SAMPLES)}"
        remove_leftovers(results_dir / name)
        write_bytes(results_dir / name, (run_dir / score.samples).read_bytes())
        scores.append(replace(score, samples=name))
    own = replace(
        record,
        suite=config.suite,
        name=config.name,
        config={**config.to_dict(), "dtype": record.config["dtype"]},
        command=command,
        evaluations=tuple(scores),
    )
    publish_activity(config, command, run_dir, results_dir)
    file = results_dir / own.file_name
    remove_leftovers(file)
    own.write(file)
    return file


def _subject(config: RunConfig, run_dir: Path) -> Subject:
    if config.is_base:
        model = load_backbone(
            config.backbone, config.dtype, device=best_device(), attention=config.attention
        )
        return Subject(model, load_tokenizer(config.backbone), None)
    fitted = fit(config, run_dir)
    return Subject(fitted.model, fitted.tokenizer, fitted)


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


def _measure(
    config: RunConfig,
    subject: Subject,
    tests: tuple[TestSet, ...],
    run_dir: Path,
) -> tuple[tuple[Score, ...], Merge | None]:
    """Score the model as it is and, if its method merges, score the merged model as well."""
    score = partial(_score_all, config, subject, tests, run_dir)
    if config.is_base:
        return score("base"), None
    scores = score("unmerged")
    if not state_of(subject.model).config.mergeability().ok:
        return scores, None
    with part("merging"):
        before = _logits(subject, tests[0])
        report = merge(subject.model)
        after = _logits(subject, tests[0])
    scores += score("merged")
    unmerge(subject.model)
    return scores, _merge_record(report, after - before, scores, run_dir)


def _score_all(
    config: RunConfig,
    subject: Subject,
    tests: tuple[TestSet, ...],
    run_dir: Path,
    variant: Variant,
) -> tuple[Score, ...]:
    parts = (_score(config, subject, test, run_dir, variant) for test in tests)
    return tuple(score for part in parts for score in part)


def _score(
    config: RunConfig,
    subject: Subject,
    test: TestSet,
    run_dir: Path,
    variant: Variant,
) -> tuple[Score, ...]:
    finished = run_dir / f"scores-{test.label}-{variant}.json"
    samples = f"{SAMPLES}{test.label}--{variant}.jsonl.gz"
    if not (finished.exists() and (run_dir / samples).exists()):
        with part(f"scoring {variant} on {test.task}"):
            evaluation = evaluate(
                *(subject.model, subject.tokenizer, test.task, test.items, test.protocol),
                batch_size=config.eval_batch_size,
                engine=config.engine,
                execute_code=config.execute_code,
            )
        evaluation.write_samples(run_dir / samples)
        write_json(finished, [asdict(s) for s in evaluation.to_records(variant, samples)])
    saved = read_kept(finished, list)
    return tuple(codec.decode(Score, score, str(finished)) for score in saved)


@torch.inference_mode()
def _logits(subject: Subject, test: TestSet) -> Tensor:
    """Return the last position's logits of the first test prompts. Shape: (probes, vocabulary)."""
    task, asked = get_task(test.task), get_protocol(test.protocol)
    model, encoder, rows = subject.model, Encoder(subject.tokenizer), []
    with evaluation_mode(model):
        for item in test.items[:PROBES]:
            prompt = asked.context(task, item) if asked.trains else item.asked
            ids = torch.tensor([encoder.encode(prompt)], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1])
    return torch.stack(rows).float()


def _merge_record(
    report: MergeReport, difference: Tensor, scores: tuple[Score, ...], run_dir: Path
) -> Merge:
    changed = 0
    files = {variant: _sample_files(scores, variant) for variant in ("unmerged", "merged")}
    for before, after in zip(files["unmerged"], files["merged"], strict=True):
        pairs = zip(_predictions(run_dir, before), _predictions(run_dir, after), strict=True)
        changed += sum(first != second for first, second in pairs)
    return Merge(
        num_merged=report.num_merged,
        max_abs_delta=report.max_abs_delta,
        relative_delta=report.relative_delta,
        logits_max_difference=difference.abs().max().item(),
        logits_rms_difference=difference.square().mean().sqrt().item(),
        answers_changed=changed,
    )


def _sample_files(scores: tuple[Score, ...], variant: str) -> list[tuple[str, str]]:
    """Return each test set's file of outputs, with the main metric."""
    main = {str(s.samples): s.metric for s in reversed(scores) if s.variant == variant}
    return sorted(main.items())


def _predictions(run_dir: Path, entry: tuple[str, str]) -> list[int | str | None]:
    file, metric = entry
    return [sample.prediction[metric] for sample in read_samples(run_dir / file)]


def _latency(config: RunConfig, subject: Subject, run_dir: Path) -> tuple[Latency, ...]:
    if not config.latency_rounds:
        return ()
    finished = run_dir / "latency.json"
    if finished.exists():
        saved = read_kept(finished, list)
        return tuple(codec.decode(Latency, latency, str(finished)) for latency in saved)
    with part("timing"):
        timed = measure_latency(
            subject.model, rounds=config.latency_rounds, warmup=config.latency_warmup
        )
    records = tuple(result.to_record(_variant(result.variant)) for result in timed)
    write_json(finished, [asdict(latency) for latency in records])
    return records


def _variant(name: str) -> Variant:
    variant: Variant = codec.decode(Variant, name, "latency")
    return variant


def _record(
    config: RunConfig,
    command: str,
    started: str,
    backbone: Backbone,
    tests: tuple[TestSet, ...],
    fitted: Fitted | None,
    *,
    scores: tuple[Score, ...] = (),
    merged: Merge | None = None,
    latency: tuple[Latency, ...] = (),
    status: Status = "success",
    error: str | None = None,
) -> RunRecord:
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
        data=_data(config, tests, fitted),
        training=fitted.training if fitted else None,
        evaluations=scores,
        merge=merged,
        latency=latency,
        status=status,
        error=error,
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
    """Describe the backbone as it is loaded, not as an adapter's run left it."""
    return Backbone(name, backbone_hash(load_backbone(name, dtype)))
