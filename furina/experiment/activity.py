"""The part of a cell that looks at its experts' activity on the questions that it scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from furina.analysis import TaskItems, analyse
from furina.experiment.config import RunConfig
from furina.progress import part
from furina.records import ActivityRecord, Backbone
from furina.storage import remove_leftovers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FILE = "activity.json"
FOLDER = "activity"


def record_activity(
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, TaskItems],
    backbone: Backbone,
    run_dir: Path,
) -> None:
    """Analyse the trained model on `activity_items` of each task, unless that is done already.

    Raises ConfigurationError if the method has no experts to select from.
    """
    file = run_dir / FILE
    if config.activity_items and not file.exists():
        with part("analysing the experts"):
            record = analyse(
                model,
                tokenizer,
                tasks,
                backbone=backbone,
                size=config.activity_items,
                subset_seed=config.test_seed,
                batch_size=config.eval_batch_size,
                max_length=config.max_length,
            )
        record.write(file)


def publish_activity(config: RunConfig, command: str, run_dir: Path, results_dir: Path) -> None:
    """Write a finished cell's activity under a suite's names, if it was analysed."""
    if not config.activity_items:
        return
    own = replace(
        ActivityRecord.read(run_dir / FILE),
        suite=config.suite,
        row=config.row or config.method,
        task=config.task,
        seed=config.seed,
        command=command,
    )
    file = results_dir / FOLDER / own.file_name
    remove_leftovers(file)
    own.write(file)
