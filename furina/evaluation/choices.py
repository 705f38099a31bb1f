"""Multiple-choice questions through lm-eval's evaluator, asked by the project's own protocols.

lm-eval calls `load_documents` for every task file in `tasks/`, whether it was started by
`furina evaluate` (which hands over its questions) or on its own:

    lm_eval run --model hf --model_args pretrained=FOLDER,softmax_dtype=float32 \
        --include_path furina/evaluation/tasks --tasks furina_text \
        --metadata '{"benchmark": "arc_easy", "test_size": 500}'
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict
from lm_eval.evaluator import evaluate as lm_evaluate
from lm_eval.tasks import TaskManager

from furina.data.items import Question
from furina.data.protocols import ChoiceProtocol, get_protocol
from furina.data.sources import Source, load_items
from furina.data.splits import test_subset
from furina.data.tasks import Task, get_task
from furina.errors import FurinaError
from furina.evaluation.evaluation import Engine, Evaluation, FirstPrompt, sha256
from furina.evaluation.hflm import FittedLM, live_model
from furina.evaluation.samples import ChoiceSample, predict

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"
"""lm-eval task files, one per protocol; `lm_eval --include_path` takes this folder."""

DELIMITER = " "
"""lm-eval's default between prompt and choice; acc_norm does not count it as a character."""


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
    name = f"furina_{protocol.name}"
    with live_model(model, tokenizer, batch_size, engine) as lm:
        first, truncated = _check_prompts(lm, task, questions, protocol)
        # The task file's own loader receives the metadata. simple_evaluate would also reseed every
        # generator and query the environment.
        manager = TaskManager(
            include_path=str(TASKS),
            include_defaults=False,
            metadata={"questions": questions, "benchmark": task.name},
        )
        results = lm_evaluate(lm=lm, task_dict=manager.load([name]))
    assert int(results["versions"][name]) == protocol.version
    evaluation = Evaluation.of(
        task,
        protocol,
        questions,
        [_sample(row) for row in results["samples"][name]],
        engine=engine,
        batch_size=batch_size,
        first_prompt=first,
        truncated=truncated,
    )
    for metric, score in evaluation.scores.items():
        value, stderr = (
            float(results["results"][name][f"{metric}{suffix},none"]) for suffix in ("", "_stderr")
        )
        assert math.isclose(score.value, value), "the samples are not the score's"
        assert math.isclose(score.stderr, stderr, abs_tol=1e-12)
    return evaluation


def _check_prompts(
    lm: FittedLM, task: Task, questions: Sequence[Question], protocol: ChoiceProtocol
) -> tuple[FirstPrompt, int]:
    """Encode as training does; make sure lm-eval does the same, and count what will be cut."""
    truncated = sum(
        lm.cuts(*lm.encoder.scored(protocol.context(task, question), answer)[:2])
        for question in questions
        for answer in protocol.answers(task, question)
    )
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


def load_documents(
    protocol: str,
    benchmark: str,
    questions: Sequence[Question] | None = None,
    test_size: int | None = None,
    test_seed: int = 0,
    data_source: Source = "auto",
    data_dir: str | None = None,
    **metadata: object,
) -> Any:
    """Return the documents of task `benchmark` under `protocol` as a one-split DatasetDict.

    Without `questions` they are the test split's, or its seeded subset of `test_size`. lm-eval
    passes `protocol` from the task file and the rest from its --metadata, to which it adds entries
    of its own: `metadata` takes those.
    """
    task, asks = get_task(benchmark), get_protocol(protocol)
    assert isinstance(asks, ChoiceProtocol)
    asks.require(task)
    if questions is None:
        whole = load_items(benchmark, "test", data_source, data_dir)
        _, subset = test_subset(whole, test_size, test_seed, benchmark)
        questions = [item for item in subset if isinstance(item, Question)]
    documents = [_document(task, question, asks) for question in questions]
    return DatasetDict({"test": Dataset.from_list(documents)})


def _document(task: Task, question: Question, protocol: ChoiceProtocol) -> dict[str, object]:
    """Return what lm-eval joins into `context + " " + choice`, byte for byte the prompt's text."""
    choices = protocol.answers(task, question)
    assert all(choice.startswith(DELIMITER) and choice != DELIMITER for choice in choices)
    return {
        "id": question.id,
        "context": protocol.context(task, question),
        "choices": [choice.removeprefix(DELIMITER) for choice in choices],
        "answer": protocol.right(task, question),
    }
