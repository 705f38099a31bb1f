"""Shapes of prompts that several benchmarks share, by the protocol that uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from furina.data.items import Question
from furina.data.tasks import Instructed, Labels, TextPrompt

CORRECT_ANSWER = "Please choose the correct answer to the question"


def on_one_line(question: Question) -> str:
    """Return context, if any, and stem, parted by a space."""
    return f"{question.context} {question.stem}" if question.context else question.stem


def continued(context: str, answers: Iterable[str]) -> TextPrompt:
    """Return a question for protocol `text`; `answers` come without the space before them."""
    return TextPrompt(context, tuple(f" {answer}" for answer in answers))


def by_text(question: Question) -> TextPrompt:
    """Ask "Question: …" for protocol `text`: the answers are the choices' texts."""
    return continued(f"Question: {on_one_line(question)}\nAnswer:", question.choices)


def lettered(context: Callable[[Question], str], labels: Iterable[str]) -> Labels:
    """Return how protocol `label` asks where the right label is the choice's letter."""
    return Labels(context, tuple(labels), lambda question: question.letters[question.answer])


def choices_inline(question: Question) -> str:
    """Ask as MoE-PEFT asks ARC, OpenBookQA and CommonsenseQA: " (A) …" behind the question."""
    return f"{CORRECT_ANSWER}: {question.stem}{_marked(question, ' ')}\nAnswer:"


def choices_below(lead: str, text: str, question: Question) -> str:
    """Ask as MoE-PEFT asks the other sets: a lead, a line of text, and a line for each choice."""
    return f"{lead}.\n{text}{_marked(question, chr(10))}\nAnswer:"


def _marked(question: Question, before: str) -> str:
    pairs = zip(question.letters, question.choices, strict=True)
    return "".join(f"{before}({letter}) {choice}" for letter, choice in pairs)


def numbered(
    lead: str, word: str, count: int, between: str = " ", before_format: str = "\n\n"
) -> Instructed:
    """Return how LLM-Adapters asks: numbered choices, answered by the word with the number.

    Args:
        lead: the instruction's first words, up to the colon.
        word: "answer" for answer1, answer2, …
        count: how many of them its pattern tries.
        between: what parts two choices.
        before_format: what stands before "Answer format".
    """
    words = tuple(f"{word}{number}" for number in range(1, 27))

    def instruction(question: Question) -> str:
        names = words[: len(question.choices)]
        pairs = zip(names, question.choices, strict=True)
        listed = between.join(f"{name.capitalize()}: {choice}" for name, choice in pairs)
        asked = f"{lead}: {on_one_line(question)}\n\n{listed}"
        return f"{asked}{before_format}Answer format: {'/'.join(names)}"

    return Instructed(instruction, words[:count], lambda question: words[question.answer])
