"""One cell of a table: fine-tune, score unmerged, merge, score merged, time, record.

Each finished part is kept in the run's folder, so a killed cell repeats only the part it was in.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from furina.backbones import backbone_hash, best_device, load_backbone, load_tokenizer
from furina.data.prompts import Prompt
from furina.data.questions import Question, data_hash
from furina.data.sources import load_questions, resolve_source
from furina.data.splits import test_subset, warn_overlap
from furina.evaluation.harness import evaluate
from furina.evaluation.samples import read_samples
from furina.experiment.config import RunConfig
from furina.experiment.fit import Fitted, claim, fit
from furina.inject import state_of
from furina.latency import measure_latency
from furina.merging import MergeReport, merge, unmerge
from furina.mode import evaluation_mode
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
from furina.storage import write_bytes, write_json
from furina.training import DivergedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROBES = 8
"""Test prompts on which merged and unmerged logits are compared."""


class Subject(NamedTuple):
    """A model under test, and what it was fitted on if it was."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fitted: Fitted | None


class TestSet(NamedTuple):
    """The named questions that are scored."""

    name: str
    questions: list[Question]


def run_cell(config: RunConfig, run_dir: Path, results_dir: Path, command: str) -> Path:
    """Run one cell and write its record and per-question outputs; returns the record's file.

    A run that diverges leaves a record that says so, and raises DivergedError.
    """
    started = timestamp()
    reset_peak_memory()
    claim(config, run_dir)
    test = _test_set(config)
    record = partial(_record, config, command, started, test)
    file = results_dir / f"{config.name}.json"
    try:
        subject = _subject(config, run_dir)
    except DivergedError as error:
        record(None, error=str(error)).write(file)
        raise
    if subject.fitted is not None:
        warn_overlap(subject.fitted.data.train_questions, test.questions, config.task)
    scores, merged = _measure(config, subject, test, run_dir, results_dir)
    latency = _latency(config, subject, run_dir)
    record(subject.fitted, scores=scores, merged=merged, latency=latency).write(file)
    return file


def _subject(config: RunConfig, run_dir: Path) -> Subject:
    if config.is_base:
        model = load_backbone(
            config.backbone, config.dtype, device=best_device(), attention=config.attention
        )
        return Subject(model, load_tokenizer(config.backbone), None)
    fitted = fit(config, run_dir)
    return Subject(fitted.model, fitted.tokenizer, fitted)


def _test_set(config: RunConfig) -> TestSet:
    questions = load_questions(config.task, "test", config.source, config.data_dir)
    return TestSet(*test_subset(questions, config.test_size, config.test_seed))


def _measure(
    config: RunConfig, subject: Subject, test: TestSet, run_dir: Path, results_dir: Path
) -> tuple[tuple[Score, ...], Merge | None]:
    """Score the model as it is and, if its method merges, score the merged model as well."""
    score = partial(_score, config, subject, test, run_dir, results_dir)
    if config.is_base:
        return score("base"), None
    scores = score("unmerged")
    if not state_of(subject.model).config.mergeability().ok:
        return scores, None
    before = _logits(subject, test, config)
    report = merge(subject.model)
    after = _logits(subject, test, config)
    scores += score("merged")
    unmerge(subject.model)
    return scores, _merge_record(report, after - before, scores, results_dir)


def _score(
    config: RunConfig,
    subject: Subject,
    test: TestSet,
    run_dir: Path,
    results_dir: Path,
    variant: Variant,
) -> tuple[Score, ...]:
    finished, kept = run_dir / f"scores-{variant}.json", run_dir / f"samples-{variant}.jsonl.gz"
    samples = f"samples/{config.name}--{variant}.jsonl.gz"
    if not (finished.exists() and kept.exists()):
        evaluation = evaluate(
            *(subject.model, subject.tokenizer, config.task, test.questions, config.form),
            batch_size=config.eval_batch_size,
        )
        evaluation.write_samples(kept)
        write_json(finished, [asdict(s) for s in evaluation.to_records(variant, samples)])
    # The copy in results may be another config's by now: both bear the same name.
    write_bytes(results_dir / samples, kept.read_bytes())
    saved = json.loads(finished.read_text(encoding="utf-8"))
    return tuple(codec.decode(Score, score, str(finished)) for score in saved)


@torch.inference_mode()
def _logits(subject: Subject, test: TestSet, config: RunConfig) -> Tensor:
    """Return the last position's logits of the first test prompts. Shape: (probes, vocabulary)."""
    prompts = [Prompt(config.form).context(question) for question in test.questions[:PROBES]]
    model, rows = subject.model, []
    with evaluation_mode(model):
        for prompt in prompts:
            ids = torch.tensor([subject.tokenizer.encode(prompt)], device=model.device)
            rows.append(model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1])
    return torch.stack(rows).float()


def _merge_record(
    report: MergeReport, difference: Tensor, scores: tuple[Score, ...], results_dir: Path
) -> Merge:
    first = {score.variant: score for score in reversed(scores)}
    predictions = {
        variant: [
            sample.prediction[first[variant].metric]
            for sample in read_samples(results_dir / str(first[variant].samples))
        ]
        for variant in ("unmerged", "merged")
    }
    pairs = zip(predictions["unmerged"], predictions["merged"], strict=True)
    return Merge(
        num_merged=report.num_merged,
        max_abs_delta=report.max_abs_delta,
        relative_delta=report.relative_delta,
        logits_max_difference=difference.abs().max().item(),
        logits_rms_difference=difference.square().mean().sqrt().item(),
        answers_changed=sum(before != after for before, after in pairs),
    )


def _latency(config: RunConfig, subject: Subject, run_dir: Path) -> tuple[Latency, ...]:
    if not config.latency_rounds:
        return ()
    finished = run_dir / "latency.json"
    if finished.exists():
        saved = json.loads(finished.read_text(encoding="utf-8"))
        return tuple(codec.decode(Latency, latency, str(finished)) for latency in saved)
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
    test: TestSet,
    fitted: Fitted | None,
    *,
    scores: tuple[Score, ...] = (),
    merged: Merge | None = None,
    latency: tuple[Latency, ...] = (),
    error: str | None = None,
) -> RunRecord:
    rows = (fitted.data.train_questions, fitted.data.validation_questions) if fitted else ([], [])
    train, validation = (data_hash(questions) if questions else None for questions in rows)
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
        backbone=Backbone(config.backbone, _backbone_hash(config)),
        data=Data(
            task=config.task,
            source=resolve_source(config.source, config.data_dir),
            train_sha256=train,
            validation_sha256=validation,
            test_sha256=data_hash(test.questions),
            test_subset=test.name,
        ),
        training=fitted.training if fitted else None,
        evaluations=scores,
        merge=merged,
        latency=latency,
        status="diverged" if error else "success",
        error=error,
    )


def _backbone_hash(config: RunConfig) -> str:
    """Hash the backbone as it is loaded, not as an adapter's run left it."""
    return backbone_hash(load_backbone(config.backbone, config.dtype))
