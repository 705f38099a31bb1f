"""Short runs that decide the defaults, scored on questions held out of train; test is not read."""

from __future__ import annotations

from pathlib import Path

from furina.adapters import configure
from furina.data.protocols import ChoiceProtocol, get_protocol
from furina.data.sources import load_items
from furina.data.splits import split_train
from furina.errors import ConfigurationError
from furina.evaluation.evaluate import evaluate
from furina.experiment.config import RunConfig
from furina.experiment.fit import Fitted, fit
from furina.experiment.process import load_untouched, planned_steps
from furina.progress import part
from furina.records import SearchRecord, SelectionRecord, provenance
from furina.training import DivergedError


def search_trial(config: RunConfig, run_dir: Path, command: str) -> SearchRecord:
    """Fine-tune and score on the held-out train items; a diverged trial has no score.

    Raises ConfigurationError for what a search does not score: a mixture, or generated answers.
    """
    config = config.resolved()
    config.check_tasks()
    protocol = get_protocol(config.protocol)
    if config.mixture or config.score or not isinstance(protocol, ChoiceProtocol):
        raise ConfigurationError(
            "A search scores the held-out questions of one task under protocol text or label: "
            "leave mixture and score out."
        )
    options = {} if config.is_base else configure(config.method, config.adapter).to_dict()
    fitted, seconds = None, 0.0
    try:
        if not config.is_base:
            fitted = fit(config, run_dir)
            seconds = fitted.training.seconds
        value, stderr = _held_out_score(config, fitted)
    except DivergedError:
        value, stderr = None, None
    return SearchRecord(
        method=config.method,
        task=config.task,
        protocol=config.protocol,
        learning_rate=0.0 if config.is_base else config.learning_rate,
        magnitude_multiplier=options.get("magnitude_lr_multiplier"),
        steps=0 if config.is_base else planned_steps(config),
        seed=config.seed,
        metric=protocol.metrics[0],
        value=value,
        stderr=stderr,
        n=config.validation_size,
        seconds=seconds,
        config=config.to_dict(),
        command=command,
        provenance=provenance(),
    )


def selection_trial(config: RunConfig, run_dir: Path, command: str) -> SelectionRecord:
    """Fine-tune and measure how concentrated expert selection is on held-out questions.

    Raises ConfigurationError, before any training, if there is nothing to measure.
    """
    config = config.resolved()
    adapter = configure(config.method, config.adapter)
    if not hasattr(adapter, "selection_coefficient"):
        raise ConfigurationError(
            f"Method {config.method} has no selection loss to study: choose method furina."
        )
    if not adapter.records_selection or not config.validation_size:
        raise ConfigurationError(
            f"There is no expert selection to measure: method {config.method} must have more than "
            "top_k self-routed experts, and validation_size must not be 0."
        )
    options, training = adapter.to_dict(), fit(config, run_dir).training
    assert training.selection is not None and training.final_loss is not None
    return SelectionRecord(
        method=config.method,
        task=config.task,
        seed=config.seed,
        coefficient=options["selection_coefficient"],
        reduction=options["selection_reduction"],
        top_k=options["top_k"],
        steps=training.steps,
        top_k_share=training.selection["top_k_share"],
        final_loss=training.final_loss,
        gradient_ratio=training.gradient_ratio,
        config=config.to_dict(),
        command=command,
        provenance=provenance(),
    )


def _held_out_score(config: RunConfig, fitted: Fitted | None) -> tuple[float, float]:
    if fitted is None:
        model, tokenizer = load_untouched(config)
        rows = load_items(config.task, "train", config.source, config.data_dir)
        items = split_train(rows, config.validation_size, config.seed)[1]
    else:
        model, tokenizer = fitted.model, fitted.tokenizer
        items = fitted.data.validation_items[config.task]
    with part("scoring held-out items"):
        evaluation = evaluate(
            model,
            tokenizer,
            config.task,
            items,
            config.protocol,
            batch_size=config.eval_batch_size,
            engine=config.engine,
        )
    score = evaluation.scores[get_protocol(config.protocol).metrics[0]]
    return score.value, score.stderr
