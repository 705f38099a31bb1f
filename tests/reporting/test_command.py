"""`furina report` writes what belongs to the records it was given, and says what is odd in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from furina.cli import main
from furina.cli.shared import own_readme
from furina.reporting.figures import plots
from furina.reporting.pages.generate import BEGIN, END
from furina.reporting.read import statistics as significance

BLOCK = f"# Mine\n\n{BEGIN}\nold\n{END}\n"


@pytest.fixture
def here(results: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with results/ and a README that takes a table."""
    monkeypatch.setattr(plots, "svg", lambda figure: "<svg/>\n")
    monkeypatch.setattr(significance, "RESAMPLES", 99)
    monkeypatch.chdir(results.parent)
    readme = results.parent / "README.md"
    readme.write_text(BLOCK)
    return readme


def test_the_readme_takes_the_table_of_the_results_beside_it(here: Path, capsys) -> None:
    assert main(["report"]) == 0
    assert "| lora" in here.read_text()
    assert "the table in README.md among them" in capsys.readouterr().out
    assert main(["report", "--results", "./results", "--check"]) == 0


def test_the_readme_is_left_alone_by_a_report_on_other_results(here: Path, capsys) -> None:
    Path("results").rename("mine")
    assert main(["report", "--results", "mine"]) == 0
    assert here.read_text() == BLOCK
    assert "README" not in capsys.readouterr().out
    assert Path("mine/report.html").is_file()
    assert main(["report", "--results", "mine", "--check"]) == 0
    assert main(["report", "--results", "mine", "--readme", "README.md"]) == 0
    assert "| lora" in here.read_text()


def test_other_results_than_the_folders_own_have_no_readme(here: Path) -> None:
    assert own_readme(Path("results")) == own_readme(Path.cwd() / "results") == Path("README.md")
    assert own_readme(Path("mine")) is None and own_readme(Path("runs/results")) is None


def test_a_readme_without_a_block_is_left_alone(here: Path) -> None:
    here.write_text("# Mine\n")
    assert main(["report"]) == 0
    assert here.read_text() == "# Mine\n"


def test_a_suite_for_no_readme_is_refused(here: Path, capsys) -> None:
    Path("results").rename("mine")
    assert main(["report", "--results", "mine", "--suite", "quickstart"]) == 2
    assert "--suite quickstart has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "lorra"}, "is of method 'lorra', which this furina does not have"),
        (
            {"suite": "other"},
            "is of suite 'other', and is tabulated with 'quickstart', in whose folder it lies",
        ),
    ],
)
def test_a_strange_record_is_tabulated_with_a_warning(here: Path, change, said, capsys) -> None:
    file = next(Path("results/quickstart").glob("lora--arc_easy*.json"))
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, **change}))
    assert main(["report"]) == 0
    assert f"warning: {file} {said}.\n" in capsys.readouterr().err
