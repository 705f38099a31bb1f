"""Show how far a long task has come and how long the rest will take, if the caller asks for it.

The task calls `part` and `advance`, which do nothing outside `shown`. No thread runs beside the
task, so timings are not disturbed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

BAR, LINE = 0.25, 15.0
"""Least seconds between two updates of a terminal's bar, and between two lines elsewhere."""
WORTH_A_LINE = 1.0
"""Least seconds of a part whose end is reported."""


@contextmanager
def shown(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Show the parts of what runs inside: as a bar on a terminal, as lines in a file or pipe.

    Of processes that train together only the first shows them.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    before = _display.set(_Display(stream, clock) if is_first else None)
    try:
        yield
    finally:
        _display.reset(before)


@contextmanager
def part(name: str) -> Iterator[None]:
    """Name what runs inside; a part of a part goes by the name of the whole."""
    display = _display.get()
    if display is None or display.part is not None:
        yield
        return
    display.part, is_done = _Part(name, display.stream, display.clock), False
    try:
        yield
        is_done = True
    finally:
        display.part.close(is_done)
        display.part = None


def advance(done: int, total: int, unit: str) -> None:
    """Report how much is done, such as 12 of 32 steps; the pace counts from the first report."""
    display = _display.get()
    if display is not None and display.part is not None:
        display.part.advance(done, total, unit)


def duration(seconds: float) -> str:
    """Return a time in minutes and seconds, or in hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes}:{rest:02} min"


def say(text: str) -> None:
    """Print a line about the current part, or about the whole if there is none."""
    display = _display.get()
    if display is not None and display.part is not None:
        display.part.say(text)
    elif display is not None:
        print(f"  {text}", file=display.stream, flush=True)


class _Display:
    """Where parts are shown, and the current one."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self.stream, self.clock = stream, clock
        self.part: _Part | None = None


_display: ContextVar[_Display | None] = ContextVar("display", default=None)


class _Part:
    """A current part; its pace counts from the first `advance` of a unit or a new count."""

    def __init__(self, name: str, stream: TextIO, clock: Callable[[], float]) -> None:
        self.name, self.stream, self.clock = name, stream, clock
        self.began = self.told = clock()
        self.unit, self.done, self.start = "", 0, (0, self.began)
        self.bar = _bar(name, stream)

    def advance(self, done: int, total: int, unit: str) -> None:
        """Show the state, but not too often."""
        now = self.clock()
        if unit != self.unit or done < self.done:
            self.unit, self.start = unit, (done, now)
        self.done = done
        if now - self.told < (BAR if self.bar else LINE):
            return
        self.told = now
        text = f"{done}/{total} {unit}"
        if done > self.start[0]:
            pace = (now - self.start[1]) / (done - self.start[0])
            text += f", {duration(pace * (total - done))} left"
        if self.bar:
            self.bar.update(
                self.bar.task_ids[0], total=total, completed=done, told=text, refresh=True
            )
        else:
            self.say(text)

    def close(self, is_done: bool) -> None:
        """Remove the bar, and print how long the part took if it is done."""
        if self.bar:
            self.bar.stop()
        took = self.clock() - self.began
        if is_done and took >= WORTH_A_LINE:
            self.say(f"done in {duration(took)}")

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        line = f"  {self.name}: {text}"
        if self.bar:
            self.bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)


def _bar(name: str, stream: TextIO) -> Progress | None:
    """Show a bar and return it, None if the stream is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    console = Console(file=stream)
    if not console.is_interactive:
        return None
    texts = [
        TextColumn(text, markup=False) for text in ("  {task.description}", "{task.fields[told]}")
    ]
    bar = Progress(
        texts[0], BarColumn(), texts[1], console=console, transient=True, auto_refresh=False
    )
    bar.add_task(name, total=1, told="")
    bar.start()
    return bar
