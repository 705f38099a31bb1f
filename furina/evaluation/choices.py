"""Multiple-choice questions through lm-eval's evaluator, asked by the project's own protocols."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furina.data.items import Question, chance_level
from furina.data.protocols import ChoiceProtocol
from furina.data.tasks import Task
from furina.errors import FurinaError
from furina.evaluation.bridge import live_model
from furina.evaluation.evaluation import (
    Engine,
    Evaluation,
    FirstPrompt,
    MetricScore,
    lm_eval_version,
    metric_score,
    sha256,
)
from furina.evaluation.samples import ChoiceSample, predict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"
"""lm-eval task files, one per protocol; `lm_eval --include_path` takes this folder."""


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    questions: Sequence[Question],
    protocol: ChoiceProtocol,
    *,
    batch_size: int,
    engine: Engine,
) -> Evaluation:
    """Score `questions` by the log-likelihood of each answer, through lm-eval's evaluator.

    With engine "lm_eval" the score is lm-eval's own for the same model, task file and batch size;
    "shared" gives the same log-likelihoods up to rounding, faster.

    Raises ConfigurationError for a tokenizer that puts special tokens where they do not belong or
    does not part an answer from its prompt, and FurinaError if the model's outputs are not finite.
    Warns if prompts had to be cut.
    """
    with live_model(model, tokenizer, batch_size, engine) as lm:
        first, truncated = _check_prompts(lm, task, questions, protocol)
        results = _run(lm, task, questions, protocol)
    name = f"furina_{protocol.name}"
    samples = tuple(_sample(row) for row in results["samples"][name])
    scores = {
        metric: metric_score(metric, samples, chance_level(questions))
        for metric in samples[0].correct
    }
    _check_scores(scores, results["results"][name])
    assert int(results["versions"][name]) == protocol.version
    return Evaluation(
        task=task.name,
        protocol=protocol.name,
        protocol_version=str(protocol.version),
        engine=engine,
        lm_eval_version=lm_eval_version(),
        batch_size=batch_size,
        scores=scores,
        samples=samples,
        first_prompt=first,
        truncated=truncated,
    )


def _check_prompts(
    lm: Any, task: Task, questions: Sequence[Question], protocol: ChoiceProtocol
) -> tuple[FirstPrompt, int]:
    """Encode as training does; make sure lm-eval does the same, and count what will be cut."""
    truncated, window = 0, lm.max_length + 1  # the last token is only predicted
    for question in questions:
        context = protocol.context(task, question)
        for answer in protocol.answers(task, question):
            ids = lm.encoder.scored(context, answer)
            truncated += len(ids.context) + len(ids.continuation) > window
    if truncated:
        warnings.warn(
            f"{truncated} prompts are longer than the model's {lm.max_length} tokens: their "
            "beginnings were cut.",
            stacklevel=4,
        )
    first, target = protocol.pair(task, questions[0])
    ids = lm.encoder.pair(first, target)
    assert lm.tok_encode(first) == ids.context, "lm-eval and training encode prompts differently"
    assert lm.tok_encode(first + target) == [*ids.context, *ids.continuation]
    return FirstPrompt(first, tuple(ids.context)), truncated


def _run(
    lm: Any, task: Task, questions: Sequence[Question], protocol: ChoiceProtocol
) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.tasks import TaskManager

    # The task file's own loader receives the metadata. simple_evaluate would also reseed every
    # generator and query the environment.
    manager = TaskManager(
        include_path=str(TASKS),
        include_defaults=False,
        metadata={"questions": questions, "benchmark": task.name},
    )
    tasks = manager.load([f"furina_{protocol.name}"])
    results: Mapping[str, Any] = lm_evaluate(lm=lm, task_dict=tasks)
    return results


def _sample(row: Mapping[str, Any]) -> ChoiceSample:
    document = row["doc"]
    loglikelihoods = tuple(float(value) for value, _ in row["filtered_resps"])
    if not all(math.isfinite(value) for value in loglikelihoods):
        raise FurinaError(
            f"The model's log-likelihoods of question {document['id']} are not finite: the adapter "
            "has diverged or the dtype overflows, so there is no score."
        )
    lengths = tuple(len(choice) for choice in document["choices"])
    prediction = {metric: predict(loglikelihoods, lengths, metric) for metric in row["metrics"]}
    return ChoiceSample(
        id=document["id"],
        prompt_sha256=sha256(document["context"]),
        answer=document["answer"],
        loglikelihoods=loglikelihoods,
        lengths=lengths,
        prediction=prediction,
        correct={metric: bool(row[metric]) for metric in row["metrics"]},
    )


def _check_scores(scores: Mapping[str, MetricScore], results: Mapping[str, Any]) -> None:
    for metric, score in scores.items():
        same = math.isclose(score.value, float(results[f"{metric},none"]))
        assert same, "the samples are not the score's"
        assert math.isclose(score.stderr, float(results[f"{metric}_stderr,none"]), abs_tol=1e-12)
