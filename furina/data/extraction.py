r"""What a model's output answers: pure functions of text, each a documented rule.

Two kinds of rules stand side by side. Those of a published evaluation are repeated with their
flaws, so that its numbers can be compared: LLM-Adapters' (`evaluate.py`, `commonsense_evaluate.py`)
and lm-eval 0.4.13's for GSM8K and HumanEval. The others ask for a stated answer and are our own.
"""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from furina.data.items import Program

TOLERANCE = 1e-3
"""LLM-Adapters' distance up to which a number is right."""

LETTERS = "ABCDE"
"""AQuA's options."""

_NUMBER = re.compile(r"-?\d+\.?\d*")
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", "(?s).*#### ", r"\.$")
_STOPS = re.compile(r"\nclass|\ndef|\n#|\nif|\nprint|\n```")
_CODE = re.compile(
    r"^(?:import \w|from [\w.]+ import |(?:async )?def \w+\(|class \w|@\w|[A-Z_]+ *=)", re.MULTILINE
)
_GOES_ON = re.compile(r"[ \t\r)\]}@]|(?:async def|def|class|import|from) |$")
_FENCES = tuple(
    re.compile(pattern, re.DOTALL | re.IGNORECASE)
    for pattern in (
        r"```[ \t]*(?:python3?|py)[ \t\r]*\n(.*?)(?:\n[ \t]*```|\Z)",  # may lack its end
        r"```[ \t\r]*\n(.*?)\n[ \t]*```",
    )
)


def last_number(text: str) -> str | None:
    """Return the last number in the text: LLM-Adapters' rule, with commas removed first.

    A hyphen right before a digit is a sign, so that "10-12" answers -12, and a typographic minus
    is none. A point after the last digit ("is 12.") is left off, which does not change the number.
    """
    numbers = _NUMBER.findall(text.replace(",", ""))
    return numbers[-1].removesuffix(".") if numbers else None


def numbers_equal(a: str | None, b: str | None, tolerance: float = TOLERANCE) -> bool:
    """Return whether both are finite numbers at most `tolerance` apart, as LLM-Adapters compares.

    Commas and dollar signs do not count, nor does a point at the end.
    """
    numbers = _float(a), _float(b)
    return math.isfinite(sum(numbers)) and abs(numbers[0] - numbers[1]) <= tolerance


def _float(text: str | None) -> float:
    try:
        return float((text or "").replace(",", "").replace("$", ""))
    except ValueError:
        return math.nan


def first_letter(text: str, letters: str = LETTERS) -> str | None:
    """Return the first of the capital letters anywhere: LLM-Adapters' rule for AQuA.

    It counts inside words too: an output that begins with "Because" answers B.
    """
    return next((character for character in text if character in letters), None)


def strict_letter(text: str, letters: str = LETTERS) -> str | None:
    """Return the letter after the first "#### ", in brackets or not: `strict_number`'s rule."""
    match = re.search(rf"#### \(?([{letters}])\b", text)
    return match[1] if match else None


def anchored_letter(text: str, letters: str = LETTERS) -> str | None:
    """Return the letter that the text states as its answer.

    The last "answer is X", "answer: X" (also option or choice) or "#### X" decides; without one,
    the last "(X)" or the last line that is nothing but the letter. X is a capital, in brackets or
    not. "not (B)", "(B) is wrong" and "(A) or (B)" state nothing.
    """
    bare = rf"\(?\b[{letters}]\b\)?"
    hedged = rf"{bare}(?:(?:\s+(?:or|and)\s+|\s*[/,]\s*(?:or\s+)?){bare})+"
    denied = rf"(?:\bnot|n't)\s+(?:(?i:option|choice)\s+)?{bare}"
    wrong = rf"{bare}\s+is\s+(?:not\b|wrong|incorrect|false)"
    text = re.sub(rf"{denied}|{wrong}|{hedged}", "…", text)
    filler = r"(?:[\s:*_$\"'`]|\\(?:boxed|text|textbf|mathrm)\{)*"
    stated = rf"(?i:\b(?:answer|option|choice)(?:\s+is\b|:)){filler}(?:(?i:option|choice)\s+)?"
    final = re.findall(rf"(?:{stated}|####{filler})\(?{filler}\b([{letters}])\b", text)
    if final:
        return str(final[-1])
    lone = re.findall(rf"\(([{letters}])\)|^\W*([{letters}])\W*$", text, re.MULTILINE)
    return str(lone[-1][0] or lone[-1][1]) if lone else None


def first_word(text: str, words: Sequence[str]) -> str | None:
    """Return the first of the words anywhere: LLM-Adapters' rule for its commonsense tasks.

    Case counts and nothing is anchored: "not true" answers true, "answer10" answers answer1.
    """
    match = re.search("|".join(words), text)
    return match[0] if match else None


def anchored_word(text: str, words: Sequence[str]) -> str | None:
    """Return the word that the text states in the trained sentence, "the correct answer is X".

    Or the text is nothing but the word. Case and a closing point do not count, the word must be
    whole, and "is not X" or "is X or Y" states nothing. Of several statements the last one
    counts, as in `anchored_letter`: who corrects himself is taken at his last word.
    """
    names = {word.casefold(): word for word in words}
    word = rf"\b({'|'.join(map(re.escape, words))})\b"
    open_end = rf"(?!\s*(?:or|and|/|,)\s*(?:or\s+)?{word})"
    quotes = r"[\s:*_\"'`(]*"
    stated = rf"\bthe\s+correct\s+answer\s+is\b{quotes}{word}{open_end}"
    matches = list(re.finditer(stated, text, re.IGNORECASE))
    whole = re.fullmatch(rf"{quotes}{word}\W*", text, re.IGNORECASE)
    match = matches[-1] if matches else whole
    return names[match[1].casefold()] if match else None


def strict_number(text: str) -> str | None:
    """Return the first "#### n" of the text: lm-eval's strict-match of gsm8k, normalised."""
    match = _STRICT.search(text)
    return normalise_number(match[1]) if match else None


def flexible_number(text: str) -> str | None:
    """Return the last number-like run: lm-eval's flexible-extract of gsm8k, normalised.

    Two or more of "$0123456789.," make a run, so that a closing "..." is one, and no number.
    """
    runs = list(_FLEXIBLE.finditer(text))
    return normalise_number(runs[-1][0]) if runs else None


def normalise_number(text: str) -> str:
    """Return what lm-eval's exact_match of gsm8k compares, of a whole solution or of a number.

    Commas, dollar signs, all up to the last "#### " and a closing point are left out.
    """
    for pattern in _IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def last_boxed(text: str) -> str | None:
    r"""Return what the last whole \boxed{…} or \fbox{…} holds; "\boxed 5" needs no braces.

    One that is cut off, as at the end of a long output, does not count.
    """
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*", text))):
        rest = text[match.end() :]
        if rest.startswith("{"):
            content = _braced(rest)
        else:
            bare = re.match(r"[^\s$]+", rest)
            content = bare[0].rstrip(".,;") if bare else None
        if content is not None:
            return content.strip()
    return None


def _braced(text: str) -> str | None:
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[1 : match.start()]
    return None


_RULES = (
    (r"^\\\((.*)\\\)$|^\\\[(.*)\\\]$", r"\1\2"),
    (r"\\\$|\$|\\%|%|(?<!\\)\\[!,;:> ]|~|\\q?quad(?![A-Za-z])", ""),  # signs and spacing
    (r"[.,;\s]+$", ""),
    (r"\\(?:left|right|displaystyle)(?![A-Za-z])", ""),
    (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])|°", ""),
    (r"\\(le|ge|ne)q(?![A-Za-z])", r"\\\1"),
    (r"(?<=[\w})])\s*\\(?:text|mbox|mathrm)\{\s*[^{}]*\}(?:\^\{?\d\}?)?$", ""),  # a unit
    (r"\\(?:text|textbf|mbox|mathrm|mathbf)\{\s*([^{}]*?)\s*\}", r"\1"),
    (r"(?<=\d)\s*(?:[kcm]m|inches|inch|feet|units?|degrees|dollars|cents)\s*$", ""),
    (r"\s+", ""),
    (r"(?<=\d)\{,\}(?=\d)", ","),
    (r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\\frac(\d)\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}"),
    (r"\\sqrt(\d)", r"\\sqrt{\1}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"\\frac\{-(\w+)\}", r"-\\frac{\1}"),
    (r"^([-+]?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"(?<=\d)\.0+(?!\d)", ""),
    (r"^[A-Za-z]=(?=.)", ""),  # "x=5" answers 5
    (r"^\(([A-Z])\)$", r"\1"),
    (r"^\+(?=\d)", ""),
)


def normalise_latex(text: str) -> str:
    r"""Return a light normal form of a MATH answer; no algebra is done.

    Spacing, dollar and percent signs, degrees, \left and \right, a unit at the end, a point at
    the end and commas between thousands go; \dfrac, "3/4" and \frac34 become \frac{3}{4}, ".5"
    becomes 0.5, "x=5" becomes 5, \text{…} its content.
    """
    text = text.strip().replace("\u2212", "-")
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):  # but (1,200) is a pair
        text = text.replace(",", "")
    return text


def latex_equal(a: str, b: str) -> bool:
    """Return whether both have one normal form, or are the same plain number or fraction."""
    a, b = normalise_latex(a), normalise_latex(b)
    number = _fraction(a)
    return (a == b and a != "") or (number is not None and number == _fraction(b))


def _fraction(text: str) -> Fraction | None:
    text = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)
    try:
        return Fraction(text) if re.fullmatch(r"-?\d+(?:\.\d+|/\d+)?", text) else None
    except ZeroDivisionError:
        return None


def verified(gold: str, output: str) -> bool | None:
    r"""Return whether math-verify finds in the output what `gold` says, None if gold is unreadable.

    An independent cross-check: its parser finds the answer (\boxed or another) by itself, and
    compares by algebra. Its time limit is a signal, which only the main thread can take: in
    other threads it runs without one. An outer timer of this process goes on afterwards.
    """
    import math_verify

    limit = 5 if threading.current_thread() is threading.main_thread() else None
    with _undisturbed(math_verify):
        expected = math_verify.parse(f"${gold.strip().strip('$')}$", parsing_timeout=limit)
        if not any(not isinstance(reading, str) for reading in expected):
            return None
        found = math_verify.parse(output, parsing_timeout=limit)
        return bool(math_verify.verify(expected, found, timeout_seconds=limit))


@contextmanager
def _undisturbed(package: Any) -> Iterator[None]:
    """Silence math-verify's remark that there is no limit, and give back the timer it takes."""
    for module in (package.parser, package.grader):
        module.TIMEOUT_WARNING_SHOWN = True
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    start, (left, interval) = time.monotonic(), signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        if left:
            rest = max(left - (time.monotonic() - start), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)


def complete_program(item: Program, output: str) -> str:
    """Return the source that runs the output against the item's tests, to its last line.

    What counts is the first block fenced as Python, without one the first that is fenced at all,
    or else all of the output. If that defines the entry point, it stands after what the prompt
    has before its own definition (imports, helpers); prose around an unfenced definition is left
    off. Otherwise it is a body, put behind the prompt and cut where lm-eval's humaneval stops: at
    the next top-level statement. Nothing is indented anew: a body without indentation fails.
    """
    fence = next((match for each in _FENCES if (match := each.search(output))), None)
    text = fence[1] if fence else output
    definition = re.compile(rf"^def {re.escape(item.entry_point)}\(", re.MULTILINE)
    if definition.search(text):
        head = definition.split(item.prompt, maxsplit=1)[0]
        program = head + (text if fence else _unfenced(text, definition))
    else:
        program = item.prompt + _STOPS.split(text, maxsplit=1)[0]
    return f"{program}\n{item.tests}\ncheck({item.entry_point})\n"


def _unfenced(text: str, definition: re.Pattern[str]) -> str:
    """Cut prose before the first line of code, and from the first line after that is none."""
    first, entry = _CODE.search(text), definition.search(text)
    assert first and entry
    lines = text[entry.start() :].split("\n")
    end = next((n for n, line in enumerate(lines) if not _GOES_ON.match(line)), len(lines))
    return text[first.start() : entry.start()] + "\n".join(lines[:end])
