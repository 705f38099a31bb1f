"""Score a live model on lm-eval's own tasks, with data of the hub or given rows."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import lm_eval.tasks
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.tasks._yaml_loader import load_yaml

from furina.data.items import Item, Question
from furina.data.parsing import Row
from furina.data.protocols import get_protocol
from furina.data.tasks import Task
from furina.errors import ConfigurationError, DataError, nearest
from furina.evaluation.evaluation import Engine, Evaluation, FirstPrompt, sha256
from furina.evaluation.hflm import FittedLM, live_model, quiet
from furina.evaluation.samples import ChoiceSample, predict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


FEWSHOT_SEED = 1234
"""lm-eval's default for drawing examples."""

CHOICE_METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class BuiltinSample:
    """One question as lm-eval's task asked and judged it.

    `prompts` and `answers` are what was scored, pairwise, and `loglikelihoods` what came out; all
    are empty for a task that is not scored by log-likelihoods of choices. `target` is the task's
    right answer in the task's own terms; `correct` is the question's value by metric.
    """

    doc_id: int
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    loglikelihoods: tuple[float, ...]
    target: str
    correct: dict[str, float]

    @property
    def prediction(self) -> int:
        """Return the first choice of the highest log-likelihood."""
        return self.loglikelihoods.index(max(self.loglikelihoods))


@dataclass(frozen=True)
class BuiltinScore:
    """One metric of one of lm-eval's tasks, with its answer filter and the task's version.

    `stderr` is None where lm-eval gives none; `n` counts the questions scored, of which `samples`
    has every one (none for a group of tasks).
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    n: int
    version: str
    samples: tuple[BuiltinSample, ...] = field(default=(), repr=False)


def builtin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
    rows: Mapping[str, Sequence[Row]] | None = None,
    engine: Engine = "shared",
) -> tuple[BuiltinScore, ...]:
    """Score a live model on lm-eval's tasks `names`, with lm-eval's prompts and defaults.

    `limit` takes the first questions only; `num_fewshot` None keeps each task's own number.
    A task named in `rows` is asked about these rows, in its dataset's own format, and needs no
    network. Prompts are not those of the project's protocols: never compare the scores.

    Raises ConfigurationError for an unknown task, or examples wanted of a task with `rows`, and
    DataError if a task's data cannot be loaded.
    """
    with live_model(model, tokenizer, batch_size, engine) as lm:
        return _run(lm, names, limit, num_fewshot, rows or {})


def score_builtin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    *,
    batch_size: int,
    engine: Engine,
) -> Evaluation:
    """Score `questions` by lm-eval's own task, untouched; its version is the protocol's."""
    assert task.harness and task.harness_row
    rows = [task.harness_row(question) for question in questions]
    with live_model(model, tokenizer, batch_size, engine) as lm:
        results = _run(lm, [task.harness], None, None, {task.harness: rows})
        scores = [score for score in results if score.metric in CHOICE_METRICS]
        first = scores[0].samples[0].prompts[0]
        first_prompt = FirstPrompt(first, tuple(lm.tok_encode(first)))
        pairs = (zip(s.prompts, s.answers, strict=True) for s in scores[0].samples)
        truncated = sum(lm.cuts(*lm.encoder.pair(*pair)[:2]) for pair in chain(*pairs))
    evaluation = Evaluation.of(
        task,
        get_protocol("lm_eval"),
        questions,
        list(map(_choice_sample, questions, scores[0].samples)),
        engine=engine,
        batch_size=batch_size,
        first_prompt=first_prompt,
        truncated=truncated,
        protocol_version=scores[0].version,
    )
    assert all(abs(evaluation.scores[s.metric].value - s.value) < 1e-9 for s in scores)
    return evaluation


def harness_prompt(task: Task, question: Item) -> tuple[str, str]:
    """Return what lm-eval's own task asks, and the right answer, byte for byte."""
    assert task.harness and task.harness_row and isinstance(question, Question)
    with quiet():
        loaded = _load([task.harness], {task.harness: [task.harness_row(question)]})
        harness = loaded["tasks"][task.harness]
        harness.build_all_requests()
    prompt, answer = harness.instances[question.answer].args
    return str(prompt), str(answer)


def _choice_sample(question: Question, sample: BuiltinSample) -> ChoiceSample:
    # Choices may be asked by their letters or be alternatives in the prompt.
    lengths = tuple(len(answer.removeprefix(" ")) for answer in sample.answers)
    metrics = [metric for metric in CHOICE_METRICS if metric in sample.correct]
    return ChoiceSample(
        id=question.id,
        prompt_sha256=sha256(sample.prompts[0]),
        answer=question.answer,
        loglikelihoods=sample.loglikelihoods,
        lengths=lengths,
        prediction={m: predict(sample.loglikelihoods, lengths, m) for m in metrics},
        correct={m: bool(sample.correct[m]) for m in metrics},
    )


def _run(
    lm: FittedLM,
    names: Sequence[str],
    limit: int | None,
    num_fewshot: int | None,
    rows: Mapping[str, Sequence[Row]],
) -> tuple[BuiltinScore, ...]:
    tasks = _load(names, rows)
    for name, task in tasks["tasks"].items():
        default = task.get_config("num_fewshot") or 0
        shots = default if num_fewshot is None else num_fewshot
        if shots and name in rows:
            raise ConfigurationError(
                f"lm-eval's task {name} wants {shots} examples, and rows given to it hold none."
            )
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(FEWSHOT_SEED)
    return tuple(_scores(lm_evaluate(lm=lm, task_dict=tasks, limit=limit, log_samples=True)))


def _load(names: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> Any:
    manager = _manager(lm_eval.tasks.TaskManager)
    for name in [*names, *rows]:
        if name not in manager.task_index:
            similar = difflib.get_close_matches(name, manager.all_tasks, n=10)
            raise ConfigurationError(f"lm-eval has no task {name!r}.{nearest(name, similar)}")
    given = [_with_rows(manager, name, rows[name]) for name in names if name in rows]
    try:
        return manager.load([*given, *(name for name in names if name not in rows)])
    except Exception as error:  # the hub's client, datasets and pyarrow each raise their own
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(
            f"The data of lm-eval's tasks {', '.join(names)} cannot be loaded "
            f"({type(error).__name__}: {said}): they need the Hugging Face hub, or its cache."
        ) from error


@functools.cache
def _manager(kind: Callable[[], Any]) -> Any:
    """Return the index of all tasks; making it takes ten seconds."""
    return kind()


def _with_rows(manager: Any, name: str, rows: Sequence[Row]) -> Any:
    """Return lm-eval's task with its own configuration, asked about `rows`."""
    if not rows:
        raise DataError(f"There are no rows for lm-eval's task {name}: give at least one.")
    config = load_yaml(manager.task_index[name].yaml_path, resolve_func=True)
    splits = [config.get(f"{kind}_split") for kind in ("test", "validation", "training")]
    evaluated, *others = [split for split in splits if split]

    def dataset(**_: object) -> Any:
        """Return the rows as the evaluated split: the first that the task names."""
        whole = Dataset.from_list([dict(row) for row in rows])
        empty = {split: whole.select([]) for split in others}
        return DatasetDict({**empty, evaluated: whole})

    # What the factory of lm-eval's manager takes out of a configuration.
    own = {key: value for key, value in config.items() if key not in ("tag", "group", "task_list")}
    return ConfigurableTask(config={**own, "custom_dataset": dataset})


def _scores(results: Mapping[str, Any]) -> Iterator[BuiltinScore]:
    for task, row in results["results"].items():
        for key, value in row.items():
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr"):
                continue
            stderr = row.get(f"{metric}_stderr,{answer_filter}")
            own = [r for r in results["samples"].get(task, ()) if r["filter"] == answer_filter]
            yield BuiltinScore(
                task=task,
                metric=metric,
                filter=answer_filter,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, float) else None,
                n=results["n-samples"][task]["effective"],
                version=str(results["versions"].get(task)),
                samples=tuple(_sample(r) for r in sorted(own, key=lambda r: int(r["doc_id"]))),
            )


def _sample(row: Mapping[str, Any]) -> BuiltinSample:
    answers = row["filtered_resps"]
    scored = all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers)
    pairs = list(row["arguments"]) if scored else []
    numbers = {m: row[m] for m in row["metrics"] if isinstance(row.get(m), int | float)}
    return BuiltinSample(
        doc_id=int(row["doc_id"]),
        prompts=tuple(str(pair[0]) for pair in pairs),
        answers=tuple(str(pair[1]) for pair in pairs),
        loglikelihoods=tuple(float(value) for value, _ in answers) if scored else (),
        target=str(row["target"]),
        correct={metric: float(value) for metric, value in numbers.items()},
    )
