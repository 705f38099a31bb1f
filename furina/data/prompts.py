"""The one place that turns a question into text, for training and for evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from furina.data.questions import Question
from furina.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1
"""Raised whenever a byte of any prompt changes; scores of two versions are not comparable."""

PromptForm = Literal["text", "letter"]


@dataclass(frozen=True)
class Prompt:
    """How a question is asked: answered by the text of a choice, or by its letter.

    A model reads `context(question)` and continues with `continuation(question, i)`, which
    starts with the space that parts them.

    >>> question = Question("1", "Which one flies?", ("a stone", "a bird"), answer=1)
    >>> Prompt("text").context(question) + Prompt("text").target(question)
    'Question: Which one flies?\\nAnswer: a bird'
    >>> Prompt("letter").context(question) + Prompt("letter").target(question)
    'Question: Which one flies?\\nA. a stone\\nB. a bird\\nAnswer: B'

    Raises:
        ConfigurationError: the form is unknown.
    """

    form: PromptForm = "text"

    def __post_init__(self) -> None:
        """Refuse an unknown form."""
        if self.form not in get_args(PromptForm):
            forms = nearest(str(self.form), get_args(PromptForm))
            raise ConfigurationError(f"There is no prompt form {self.form!r}.{forms}")

    def context(self, question: Question) -> str:
        """Return the text before the answer; it never ends in a space."""
        lines = [f"Question: {question.stem}"]
        if self.form == "letter":
            pairs = zip(question.letters, question.choices, strict=True)
            lines += [f"{letter}. {choice}" for letter, choice in pairs]
        return "\n".join([*lines, "Answer:"])

    def continuation(self, question: Question, index: int) -> str:
        """Return the text that gives choice `index` as the answer, leading space included."""
        answers = question.letters if self.form == "letter" else question.choices
        return f" {answers[index]}"

    def target(self, question: Question) -> str:
        """Return the continuation that gives the right answer."""
        return self.continuation(question, question.answer)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    prefix = tokenizer.bos_token_id
    if prefix is None:
        prefix = tokenizer.eos_token_id
    if text.startswith(str(tokenizer.decode(prefix))):  # the text brings its own BOS
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokenise both texts as lm-eval's HFLM does: whole first, then cut where the context ends.

    Spaces at the end of the context move to the continuation, and a BOS is there exactly if the
    tokenizer adds one by itself (lm-eval 0.4.13, `TemplateLM._encode_pair`, `HFLM.tok_encode`).

    Raises:
        ConfigurationError: the context is empty.
    """
    stripped = context.rstrip()
    if not context:
        raise ConfigurationError("A prompt's context is empty: there is nothing to continue.")
    whole = _encode(tokenizer, context + continuation)
    context_ids = _encode(tokenizer, stripped)
    return context_ids, whole[len(context_ids) :]
