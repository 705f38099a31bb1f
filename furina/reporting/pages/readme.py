"""The generated block of the README."""

from __future__ import annotations

from pathlib import Path

from furina.records import RecordError

BEGIN = "<!-- furina:table begin -->"
END = "<!-- furina:table end -->"


def fill(readme: Path, block: str) -> str:
    """Return the README's text with `block` between the two marks; RecordError without them."""
    try:
        text = readme.read_text("utf-8")
    except FileNotFoundError as error:
        raise RecordError(f"{readme} does not exist, so its table cannot be filled in.") from error
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise RecordError(f"{readme} must hold one line {BEGIN} and, after it, one line {END}.")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block.strip()}\n{END}{after}"
