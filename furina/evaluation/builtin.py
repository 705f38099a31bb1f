"""lm-eval's own tasks on a live model, wherever their data can be had."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from furina.errors import ConfigurationError, DataError, nearest
from furina.evaluation.bridge import live_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FEWSHOT_SEED = 1234
"""lm-eval's default for drawing examples."""


@dataclass(frozen=True)
class BuiltinScore:
    """One metric of one of lm-eval's tasks, with its answer filter and the task's version.

    `stderr` is None where lm-eval gives none; `n` counts the questions scored.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    version: str


def builtin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> tuple[BuiltinScore, ...]:
    """Score a live model on lm-eval's tasks `names`, with lm-eval's prompts and defaults.

    `limit` takes the first questions only; `num_fewshot` None keeps each task's own number.
    Their prompts are not the project's: never compare these scores with `evaluate`'s.

    Raises ConfigurationError for an unknown task and DataError if a task's data cannot be loaded.
    """
    with live_model(model, tokenizer, batch_size) as lm:
        from lm_eval.evaluator import evaluate as lm_evaluate

        tasks = _load(names)
        for task in tasks["tasks"].values():
            default = task.get_config("num_fewshot") or 0
            task.set_config("num_fewshot", default if num_fewshot is None else num_fewshot)
            task.set_fewshot_seed(FEWSHOT_SEED)
        results = lm_evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=False)
    return tuple(_scores(results))


def _load(names: Sequence[str]) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            similar = difflib.get_close_matches(name, manager.all_tasks, n=10)
            raise ConfigurationError(f"lm-eval has no task {name!r}.{nearest(name, similar)}")
    try:
        return manager.load(list(names))
    except Exception as error:  # the hub's client, datasets and pyarrow each raise their own
        raise DataError(
            f"The data of lm-eval's tasks {', '.join(names)} cannot be loaded "
            f"({type(error).__name__}): they need the Hugging Face hub, or its cache."
        ) from error


def _scores(results: Mapping[str, Any]) -> Iterator[BuiltinScore]:
    for task, row in results["results"].items():
        for key, value in row.items():
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr"):
                continue
            stderr = row.get(f"{metric}_stderr,{answer_filter}")
            yield BuiltinScore(
                task=task,
                metric=metric,
                filter=answer_filter,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, float) else None,
                n=results["n-samples"][task]["effective"],
                version=str(results["versions"].get(task)),
            )
