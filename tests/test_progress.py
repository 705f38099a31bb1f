"""What is shown of work that takes long, by a clock and on a stream that the tests own."""

from __future__ import annotations

import io
import re

import pytest

from furina.progress import BAR, LINE, WORTH_A_LINE, advance, duration, part, say, shown


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pipe() -> io.StringIO:
    return io.StringIO()


def work(clock: Clock, seconds: float, first: int = 0, total: int = 4, unit: str = "steps") -> None:
    advance(first, total, unit)
    for done in range(first + 1, total + 1):
        clock.now += seconds
        advance(done, total, unit)


def test_nothing_is_shown_to_a_caller_who_has_not_asked(
    clock: Clock, capfd: pytest.CaptureFixture[str]
) -> None:
    with part("training"):
        work(clock, 60)
    assert capfd.readouterr() == ("", "")


def test_a_pipe_gets_a_line_a_step_where_steps_are_long(clock: Clock, pipe: io.StringIO) -> None:
    with shown(pipe, clock), part("training"):
        work(clock, 60)
    assert pipe.getvalue().splitlines() == [
        "  training: 1/4 steps, 3:00 min left",
        "  training: 2/4 steps, 2:00 min left",
        "  training: 3/4 steps, 1:00 min left",
        "  training: 4/4 steps, 0:00 min left",
        "  training: done in 4:00 min",
    ]


def test_a_pipe_gets_no_more_than_a_line_in_a_while(clock: Clock, pipe: io.StringIO) -> None:
    with shown(pipe, clock), part("scoring"):
        work(clock, LINE / 64, total=160, unit="answers")  # exact in binary
    assert [line.split(",")[0] for line in pipe.getvalue().splitlines()] == [
        "  scoring: 64/160 answers",
        "  scoring: 128/160 answers",
        f"  scoring: done in {duration(2.5 * LINE)}",
    ]


def test_what_was_done_before_does_not_count_for_the_pace(clock: Clock, pipe: io.StringIO) -> None:
    with shown(pipe, clock), part("training"):
        work(clock, 60, first=2)
    assert "3/4 steps, 1:00 min left" in pipe.getvalue()


@pytest.mark.parametrize("unit", ["validation batches", "steps"])
def test_another_count_has_a_pace_of_its_own(unit: str, clock: Clock, pipe: io.StringIO) -> None:
    with shown(pipe, clock), part("training"):
        work(clock, 60)
        work(clock, 20, unit=unit)
    assert f"  training: 1/4 {unit}, 1:00 min left" in pipe.getvalue().splitlines()


@pytest.mark.parametrize(("seconds", "lines"), [(0.9 * WORTH_A_LINE, 0), (WORTH_A_LINE, 1)])
def test_only_what_took_a_while_is_said_to_be_done(
    seconds: float, lines: int, clock: Clock, pipe: io.StringIO
) -> None:
    with shown(pipe, clock), part("merging"):
        clock.now += seconds
    assert len(pipe.getvalue().splitlines()) == lines


def test_what_fails_is_not_said_to_be_done_and_the_next_part_is_shown(
    clock: Clock, pipe: io.StringIO
) -> None:
    with shown(pipe, clock):
        with pytest.raises(ValueError), part("training"):
            clock.now += 60
            raise ValueError
        with part("scoring"):
            clock.now += 60
    assert pipe.getvalue() == "  scoring: done in 1:00 min\n"


def test_a_part_of_a_part_goes_by_the_name_of_the_whole(clock: Clock, pipe: io.StringIO) -> None:
    with shown(pipe, clock), part("timing"):
        with part("loading"):
            work(clock, 60, total=1)
        clock.now += 60
    assert pipe.getvalue().splitlines() == [
        "  timing: 1/1 steps, 0:00 min left",
        "  timing: done in 2:00 min",
    ]


def test_a_function_can_be_a_part(clock: Clock, pipe: io.StringIO) -> None:
    @part("loading")
    def load() -> None:
        clock.now += 60

    load()
    with shown(pipe, clock):
        load()
        load()
    assert pipe.getvalue() == "  loading: done in 1:00 min\n" * 2


def test_of_processes_that_train_together_the_first_one_shows(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        pipe = io.StringIO()
        with shown(pipe, clock), part("training"):
            work(clock, 60)
        said.append(bool(pipe.getvalue()))
    assert said == [True, False]


def test_a_terminal_gets_a_bar_and_in_its_place_the_line_of_the_end(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    terminal = Terminal()
    with shown(terminal, clock), part("training"):
        work(clock, 60)
    looks = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue()).replace("\r", "\n")
    for text in ("1/4 steps, 3:00 min left", "4/4 steps, 0:00 min left"):
        assert re.search(rf"^  training [━╸╺]+ {text}", looks, re.MULTILINE)
    assert terminal.getvalue().endswith("  training: done in 4:00 min\n")
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back


def test_a_terminal_is_not_drawn_for_every_step(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for steps in (10, 640):  # exact in binary
        terminal = Terminal()
        with shown(terminal, clock), part("scoring"):
            work(clock, 10 * BAR / steps, total=steps)
        assert terminal.getvalue().count("left") == 10 + 1  # and once more at the end


def test_a_terminal_that_cannot_go_back_gets_lines(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with shown(terminal, clock), part("training"):
        work(clock, 60)
    assert "\x1b" not in terminal.getvalue()
    assert "  training: 1/4 steps, 3:00 min left\n" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00 min"), (59.6, "1:00 min"), (4000, "1 h 06 min")]
)
def test_a_time_is_in_minutes_or_hours(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_word_is_said_of_the_part_under_way_or_of_the_whole(
    clock: Clock, pipe: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    say("to nobody")
    terminal = Terminal()
    for stream in (pipe, terminal):
        with shown(stream, clock):
            say("before")
            with part("training"):
                say("resumed at step 2 of 4")
                work(clock, 60, first=2)
    assert pipe.getvalue().splitlines()[:2] == ["  before", "  training: resumed at step 2 of 4"]
    assert "training: resumed at step 2 of 4\n" in terminal.getvalue()
    assert capfd.readouterr() == ("", "")
