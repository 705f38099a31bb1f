"""Score a live model on multiple-choice questions through lm-eval, with the project's own tasks."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from furina.data.prompts import VERSION, Prompt, PromptForm, encode_pair
from furina.data.questions import Question, chance_level
from furina.errors import ConfigurationError, DataError, FurinaError, nearest
from furina.evaluation.bridge import live_model
from furina.evaluation.samples import Sample, predict, write_samples
from furina.evaluation.statistics import is_suspect, standard_error
from furina.records import Score, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"
"""lm-eval task files, one per task and answer form; `lm_eval --include_path` takes this folder."""


@dataclass(frozen=True)
class MetricScore:
    """One accuracy over `n` questions, in [0, 1]; `suspect` if not clearly above chance."""

    metric: str
    value: float
    stderr: float
    n: int
    chance: float
    suspect: bool


@dataclass(frozen=True)
class FirstPrompt:
    """What the model was given first, as text and as token ids; `sha256` is that of `context`."""

    context: str
    continuation: str
    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on one set of questions, and everything they were made from.

    `scores` is by metric, the main one (acc) first. `truncated` counts the prompts whose start was
    cut to fit the model.
    """

    task: str
    lm_eval_task: str
    task_version: str
    lm_eval_version: str
    prompt_form: str
    prompt_version: str
    batch_size: int
    scores: dict[str, MetricScore]
    samples: tuple[Sample, ...]
    first_prompt: FirstPrompt
    truncated: int

    def write_samples(self, path: Path) -> None:
        """Write the per-question outputs as gzipped JSON lines, atomically."""
        write_samples(path, self.samples)

    def to_records(self, variant: Variant, samples: str | None) -> tuple[Score, ...]:
        """Return one record per metric; `samples` is the written file, from the record's folder."""
        return tuple(
            Score(
                variant=variant,
                metric=score.metric,
                value=score.value,
                stderr=score.stderr,
                n=score.n,
                chance=score.chance,
                suspect=score.suspect,
                task_version=self.task_version,
                prompt_form=self.prompt_form,
                prompt_version=self.prompt_version,
                first_prompt_sha256=self.first_prompt.sha256,
                truncated=self.truncated,
                lm_eval=self.lm_eval_version,
                samples=samples,
            )
            for score in self.scores.values()
        )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    questions: Sequence[Question],
    form: PromptForm = "text",
    *,
    batch_size: int = 16,
    limit: int | None = None,
) -> Evaluation:
    """Score `questions` (the first `limit` of them) of `task` in answer form "text" or "letter".

    Each choice's log-likelihood after the prompt comes from lm-eval's HFLM around the live model,
    adapted, merged or plain, in eval and inference mode; the model and tokenizer are left as they
    were. The score is lm-eval's own for the same model, task file and batch size.

    Raises ConfigurationError for an unknown task or form or a tokenizer that puts special tokens
    where they do not belong, DataError for less than 2 questions or repeated ids, and FurinaError
    if the model's outputs are not finite. Warns if prompts had to be cut.
    """
    name = task_name(task, form)
    questions = list(questions)[:limit]
    _check_questions(questions)
    with live_model(model, tokenizer, batch_size) as lm:
        first, truncated = _check_prompts(lm, questions, Prompt(form))
        results = _run(lm, name, questions)
    samples = tuple(_sample(row) for row in results["samples"][name])
    return Evaluation(
        task=task,
        lm_eval_task=name,
        task_version=str(results["versions"][name]),
        lm_eval_version=_lm_eval_version(),
        prompt_form=form,
        prompt_version=str(VERSION),
        batch_size=batch_size,
        scores={
            metric: _score(metric, results["results"][name], samples, chance_level(questions))
            for metric in samples[0].correct
        },
        samples=samples,
        first_prompt=first,
        truncated=truncated,
    )


def task_name(task: str, form: str) -> str:
    """Return lm-eval's name of the task file; raises ConfigurationError if there is none."""
    known = sorted(path.stem for path in TASKS.glob("[!_]*.yaml"))
    if f"{task}_{form}" not in known:
        raise ConfigurationError(
            f"There is no evaluation of task {task!r} by answer form {form!r}."
            f"{nearest(f'{task}_{form}', known)}"
        )
    return f"furina_{task}_{form}"


def _lm_eval_version() -> str:
    import lm_eval

    return str(lm_eval.__version__)


def _check_questions(questions: Sequence[Question]) -> None:
    if len(questions) < 2:
        raise DataError(f"There are {len(questions)} questions to score: give at least 2.")
    if len({question.id for question in questions}) < len(questions):
        raise DataError("Some questions have the same id: make ids unique to tell outputs apart.")


def _check_prompts(
    lm: Any, questions: Sequence[Question], prompt: Prompt
) -> tuple[FirstPrompt, int]:
    """Encode as training does; make sure lm-eval does the same, and count what will be cut."""
    truncated, window = 0, lm.max_length + 1  # the last token is only predicted
    for question in questions:
        context = prompt.context(question)
        for i in range(len(question.choices)):
            ids = encode_pair(lm.tokenizer, context, prompt.continuation(question, i))
            truncated += len(ids[0]) + len(ids[1]) > window
            _check_special_tokens(lm.tokenizer, *ids)
    if truncated:
        warnings.warn(
            f"{truncated} prompts are longer than the model's {lm.max_length} tokens: their "
            "beginnings were cut.",
            stacklevel=3,
        )
    return _first_prompt(lm, questions[0], prompt), truncated


def _check_special_tokens(tokenizer: Any, context: Sequence[int], choice: Sequence[int]) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and list(context[:2]) == [bos, bos]:
        raise ConfigurationError(
            "The tokenizer puts two BOS tokens before a prompt: load it without one of them."
        )
    if eos is not None and eos != bos and eos in (context[-1], choice[-1]):
        raise ConfigurationError(
            "The tokenizer appends EOS to a prompt: load it with add_eos_token=False."
        )


def _first_prompt(lm: Any, question: Question, prompt: Prompt) -> FirstPrompt:
    context, continuation = prompt.context(question), prompt.target(question)
    ids = encode_pair(lm.tokenizer, context, continuation)
    assert lm.tok_encode(context) == ids[0], "lm-eval and training encode prompts differently"
    assert lm.tok_encode(context + continuation) == [*ids[0], *ids[1]]
    return FirstPrompt(context, continuation, tuple(ids[0]), tuple(ids[1]), _sha256(context))


def _run(lm: Any, name: str, questions: Sequence[Question]) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate as lm_evaluate
    from lm_eval.tasks import TaskManager

    # The task file's own loader receives the metadata. simple_evaluate would also reseed every
    # generator and query the environment.
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"questions": questions}
    )
    results: Mapping[str, Any] = lm_evaluate(lm=lm, task_dict=manager.load([name]))
    return results


def _sample(row: Mapping[str, Any]) -> Sample:
    document = row["doc"]
    loglikelihoods = tuple(float(value) for value, _ in row["filtered_resps"])
    if not all(math.isfinite(value) for value in loglikelihoods):
        raise FurinaError(
            f"The model's log-likelihoods of question {document['id']} are not finite: the adapter "
            "has diverged or the dtype overflows, so there is no score."
        )
    lengths = tuple(len(choice) for choice in document["choices"])
    prediction = {metric: predict(loglikelihoods, lengths, metric) for metric in row["metrics"]}
    return Sample(
        id=document["id"],
        prompt_sha256=_sha256(document["context"]),
        answer=document["answer"],
        loglikelihoods=loglikelihoods,
        lengths=lengths,
        prediction=prediction,
        correct={metric: bool(row[metric]) for metric in row["metrics"]},
    )


def _score(
    metric: str, results: Mapping[str, Any], samples: Sequence[Sample], chance: float
) -> MetricScore:
    value, stderr = float(results[f"{metric},none"]), float(results[f"{metric}_stderr,none"])
    correct = [sample.prediction[metric] == sample.answer for sample in samples]
    assert math.isclose(value, sum(correct) / len(correct)), "the samples are not the score's"
    assert math.isclose(stderr, standard_error(correct), abs_tol=1e-12)
    suspect = is_suspect(value, stderr, chance)
    return MetricScore(metric, value, stderr, len(samples), chance, suspect)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
