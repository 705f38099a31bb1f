"""Score a live model on a task's items, by the scorer that the protocol needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from furina.data.items import Item, Question
from furina.data.protocols import ChoiceProtocol, GenerationProtocol, get_protocol
from furina.data.tasks import get_task
from furina.errors import ConfigurationError, DataError
from furina.evaluation.answers import score_answers
from furina.evaluation.evaluation import Engine, Evaluation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    items: Sequence[Item],
    protocol: str = "text",
    *,
    batch_size: int = 16,
    limit: int | None = None,
    engine: Engine = "shared",
    execute_code: bool = False,
) -> Evaluation:
    """Score `items` (the first `limit` of them) of `task` under `protocol`.

    The model may be adapted, merged or plain; it runs in eval and inference mode and is left as it
    was, like the tokenizer. `engine` applies to log-likelihoods, `execute_code` to programs.

    Raises ConfigurationError for an unknown task or protocol, a task that the protocol cannot ask,
    a batch size or limit below 1, or programs that may not be run, DataError for less than 2 items
    or repeated ids, and FurinaError if the model's outputs are not finite. Warns if prompts had to
    be cut.
    """
    found, asks = get_task(task), get_protocol(protocol)
    asks.require(found)
    _check_counts(batch_size, limit)
    items = list(items)[:limit]
    _check_items(items)
    if isinstance(asks, GenerationProtocol):
        return score_answers(
            model, tokenizer, found, items, asks, batch_size=batch_size, execute_code=execute_code
        )
    # lm-eval takes seconds to import.
    from furina.evaluation.builtin import score_builtin
    from furina.evaluation.choices import score_choices

    questions = [item for item in items if isinstance(item, Question)]
    assert len(questions) == len(items)
    if isinstance(asks, ChoiceProtocol):
        return score_choices(
            model, tokenizer, found, questions, asks, batch_size=batch_size, engine=engine
        )
    return score_builtin(model, tokenizer, found, questions, batch_size=batch_size, engine=engine)


def _check_counts(batch_size: int, limit: int | None) -> None:
    for name, count in {"batch size": batch_size, "limit": 1 if limit is None else limit}.items():
        if type(count) is not int or count < 1:
            raise ConfigurationError(
                f"The {name} must be a whole number of questions, at least 1, not {count!r}."
            )


def _check_items(items: Sequence[Item]) -> None:
    if len(items) < 2:
        raise DataError(f"There are {len(items)} questions to score: give at least 2.")
    if len({item.id for item in items}) < len(items):
        raise DataError("Some questions have the same id: make ids unique to tell outputs apart.")
