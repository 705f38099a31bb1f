"""Score items by generated answers: generate, extract, judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from furina.data.extraction import complete_program
from furina.data.items import Item, Problem, Program, Question
from furina.data.protocols import GenerationProtocol, Judgement
from furina.data.tasks import Task
from furina.evaluation.evaluation import Evaluation, FirstPrompt, sha256
from furina.evaluation.generation import generate
from furina.evaluation.samples import TextSample
from furina.evaluation.sandbox import run_program

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    items: Sequence[Item],
    protocol: GenerationProtocol,
    *,
    batch_size: int,
    execute_code: bool = False,
) -> Evaluation:
    """Score `items` by the answers that the model generates.

    Raises ConfigurationError if judging runs programs and `execute_code` is not set. Warns if
    prompts had to be cut.
    """
    protocol.require_consent(task, execute_code)
    prompts = [protocol.context(task, item) for item in items]
    written = generate(model, tokenizer, prompts, protocol.decoding(task), batch_size)
    samples = [
        _sample(task, item, protocol, prompt, output)
        for item, prompt, output in zip(items, prompts, written.texts, strict=True)
    ]
    return Evaluation.of(
        task,
        protocol,
        items,
        samples,
        engine="generate",
        batch_size=batch_size,
        first_prompt=FirstPrompt(prompts[0], written.prompt_ids),
        truncated=written.truncated,
    )


def _sample(
    task: Task, item: Item, protocol: GenerationProtocol, prompt: str, output: str
) -> TextSample:
    if isinstance(item, Program):
        outcome = run_program(complete_program(item, output))
        judged = {protocol.metrics[0]: Judgement(outcome.reason, outcome.passed)}
    else:
        judged = protocol.judge(task, item, output)
    return TextSample(
        id=item.id,
        prompt_sha256=sha256(prompt),
        answer=_gold(item),
        output=output,
        prediction={metric: judgement.answer for metric, judgement in judged.items()},
        correct={metric: judgement.correct for metric, judgement in judged.items()},
    )


def _gold(item: Item) -> str:
    if isinstance(item, Problem):
        return item.answer
    return item.letters[item.answer] if isinstance(item, Question) else ""
