from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RecordError, RunRecord
from furina.reporting import OutdatedReportError, report
from furina.reporting.figures import plots
from furina.reporting.pages.generate import BEGIN, END, fill
from furina.reporting.read import statistics as significance
from furina.reporting.tables.overview import WIDEST
from tests.records import fakes

RESULTS = Path(__file__).parents[2] / "results"
PAPER = RESULTS / "paper"


@pytest.fixture
def whole(results: Path) -> Path:
    """A results folder with every kind of record, and a README beside it."""
    trials = [
        fakes.search_record("lora", "arc_easy", 2e-4, 0.61),
        fakes.search_record("lora", "arc_easy", 5e-4, 0.64),
    ]
    for trial in trials:
        trial.write(results / "search" / trial.file_name)
    for seed in range(3):
        for coefficient in (0.0, 0.01):
            run = fakes.selection_record(seed, coefficient, 0.36 + 4 * coefficient + 0.01 * seed)
            run.write(results / "selection" / run.file_name)
    shutil.copytree(PAPER, results / "paper", ignore=shutil.ignore_patterns("tables"))
    (results.parent / "README.md").write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    return results


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the drawing and most resamples, which are most of a report's time."""
    monkeypatch.setattr(plots, "svg", lambda figure: "<svg/>\n")
    monkeypatch.setattr(significance, "RESAMPLES", 99)


def readme(results: Path) -> Path:
    return results.parent / "README.md"


@pytest.mark.usefixtures("undrawn")
def test_every_table_is_written_in_three_forms_and_every_figure_as_svg(whole: Path) -> None:
    report(whole, readme=readme(whole))
    written = {str(p.relative_to(whole)) for p in whole.rglob("*/tables/*")}
    names = ("comparison", "main", "latency", "merge")
    tables = [f"quickstart/tables/{name}" for name in names]
    tables += ["search/tables/search", "selection/tables/selection"]
    papers = (path.stem for path in PAPER.glob("*.csv") if path.stem != "index")
    tables += [f"paper/tables/paper_{name}" for name in papers]
    assert written == {f"{table}.{end}" for table in tables for end in ("md", "csv", "tex")}
    figures = {path.name for path in whole.rglob("figures/*")}
    assert figures == {"differences.svg", "accuracy_latency.svg", "loss_curves.svg"}
    assert (whole / "report.html").is_file() and (whole / "REPRODUCING.md").is_file()


def test_a_second_report_changes_no_byte_and_passes_the_check(whole: Path) -> None:
    report(whole, readme=readme(whole))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in whole.rglob("*") if p.is_file()}
    report(whole, readme=readme(whole))
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in whole.rglob("*") if p.is_file()}
    assert before == after
    report(whole, readme=readme(whole), check=True)


@pytest.mark.usefixtures("undrawn")
def test_the_check_lists_every_differing_missing_and_stale_file_and_writes_nothing(
    whole: Path,
) -> None:
    report(whole, readme=readme(whole))
    edited = whole / "quickstart" / "tables" / "main.md"
    edited.write_text(edited.read_text().replace("base", "Base", 1))
    deleted = whole / "search" / "tables" / "search.csv"
    deleted.unlink()
    stale = whole / "quickstart" / "tables" / "old.tex"
    stale.write_text("")
    readme(whole).write_text(readme(whole).read_text().replace("| lora ", "| LoRA "))
    state = {p: p.read_bytes() for p in whole.parent.rglob("*") if p.is_file()}
    with pytest.raises(OutdatedReportError) as caught:
        report(whole, readme=readme(whole), check=True)
    listed = str(caught.value)
    for path in (edited, deleted, stale, readme(whole)):
        assert str(path) in listed
    assert str(whole / "quickstart" / "tables" / "main.csv") not in listed
    assert state == {p: p.read_bytes() for p in whole.parent.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", ["report.html", "REPRODUCING.md"])
@pytest.mark.usefixtures("undrawn")
def test_the_check_covers_the_page_and_the_statuses(name: str, whole: Path) -> None:
    report(whole)
    report(whole, check=True)
    (whole / name).write_text((whole / name).read_text() + " ")
    with pytest.raises(OutdatedReportError, match=re.escape(name)):
        report(whole, check=True)


@pytest.mark.usefixtures("undrawn")
def test_every_generated_table_is_on_the_page_and_in_the_terminal(whole: Path) -> None:
    made = report(whole)
    text = (whole / "report.html").read_text()
    for table in made.tables:
        assert f">{html.escape(table.title)}</h3>" in text
    written = {path.stem for path in whole.rglob("tables/*.csv")}
    assert written | {"status", "effort"} == {table.name for table in made.tables}


@pytest.mark.usefixtures("undrawn")
def test_what_benchmarks_wrote_is_shown_and_left_alone(whole: Path) -> None:
    shutil.copytree(RESULTS / "training", whole / "training")
    before = {path: path.read_bytes() for path in (whole / "training").iterdir()}
    report(whole)
    assert before == {path: path.read_bytes() for path in (whole / "training").iterdir()}
    text = (whole / "report.html").read_text()
    assert "training/step: One optimiser step" in text
    assert text.count("<svg") == 2 + len(list((whole / "training").glob("*.svg"))) + 1


@pytest.mark.usefixtures("undrawn")
def test_a_suite_of_the_paper_stands_beside_its_table(whole: Path) -> None:
    fakes.write_suite(whole / "main-cpu")
    report(whole)
    status = (whole / "REPRODUCING.md").read_text()
    assert "| Table 1 | Accuracy on seven commonsense tasks | main-cpu | cpu | undecided" in status
    assert "furina run variants --scale cpu" in status
    comparison = (whole / "main-cpu" / "tables" / "comparison.md").read_text()
    assert "beside the paper's Table 1" in comparison
    text = (whole / "report.html").read_text()
    assert text.index('id="main-cpu"') < text.index('id="quickstart"') < text.index('id="search"')


@pytest.mark.usefixtures("undrawn")
def test_without_the_papers_list_there_is_a_page_but_no_status(whole: Path) -> None:
    shutil.rmtree(whole / "paper")
    report(whole)
    assert (whole / "report.html").is_file()
    assert not (whole / "REPRODUCING.md").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_check_fails_when_a_record_changed(whole: Path) -> None:
    report(whole, readme=readme(whole))
    path = whole / "quickstart" / "lora--arc_easy--seed0.json"
    record = RunRecord.read(path)
    assert record.training
    replace(record, training=replace(record.training, seconds=1.0)).write(path)
    with pytest.raises(OutdatedReportError, match=r"main\.csv"):
        report(whole, readme=readme(whole), check=True)


@pytest.mark.usefixtures("undrawn")
def test_a_report_removes_tables_that_have_no_records_any_more(whole: Path) -> None:
    report(whole)
    shutil.rmtree(whole / "search")
    (whole / "search" / "tables").mkdir(parents=True)
    stale = whole / "search" / "tables" / "search.md"
    stale.write_text("old")
    report(whole)
    assert not stale.exists()


@pytest.mark.usefixtures("undrawn")
def test_other_files_in_results_are_left_alone(whole: Path) -> None:
    kept = [whole / "LOG.md", whole / "quickstart" / "notes.md", whole / "paper" / "main.csv"]
    for path in kept[:2]:
        path.write_text("mine")
    before = [path.read_bytes() for path in kept]
    report(whole)
    assert [path.read_bytes() for path in kept] == before


@pytest.mark.usefixtures("undrawn")
def test_the_readme_gets_a_table_at_a_glance_and_apart_the_papers(whole: Path) -> None:
    made = report(whole, readme=readme(whole))
    assert made.tables[-1].name == "overview"
    text = readme(whole).read_text()
    ours, papers = text.split("**In the paper:")
    assert text.startswith("# Title\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    assert "| furina <sup>" in ours
    assert "[All columns](results/quickstart/tables/main.md)" in ours
    assert "| FURINA | 85.3 |" in papers
    assert "85.3" not in ours
    assert "no cell here compares" in papers


@pytest.mark.usefixtures("undrawn")
def test_a_table_of_the_papers_that_is_too_wide_for_a_page_is_a_link(whole: Path) -> None:
    path = whole / "paper" / "main.csv"
    last = path.read_text().splitlines()[-1].split(",")
    more = (",".join([*last[:3], f"column {i}", *last[4:]]) for i in range(WIDEST))
    path.write_text(path.read_text() + "\n".join(more) + "\n")
    report(whole, readme=readme(whole))
    papers = readme(whole).read_text().split("**In the paper:")[1]
    assert "[The paper's table](results/paper/tables/paper_main.md)" in papers
    assert "FURINA" not in papers


@pytest.mark.usefixtures("undrawn")
def test_any_suite_and_any_folder_can_have_the_block(whole: Path) -> None:
    fakes.write_suite(whole / "second")
    elsewhere = whole.parent / "docs" / "page.md"
    elsewhere.parent.mkdir()
    elsewhere.write_text(f"{BEGIN}\n{END}\n")
    report(whole, readme=elsewhere, suite="second")
    (link,) = re.findall(r"\[All columns\]\((.*)\)", elsewhere.read_text())
    assert (elsewhere.parent / link).resolve() == whole / "second" / "tables" / "main.md"


@pytest.mark.usefixtures("undrawn")
def test_the_suite_of_the_readme_must_be_said_where_there_are_two(whole: Path) -> None:
    shutil.copytree(whole / "quickstart", whole / "second")
    with pytest.raises(RecordError, match="Say which suite the README shows"):
        report(whole, readme=readme(whole))
    report(whole, readme=readme(whole), suite="second")
    with pytest.raises(RecordError, match="Did you mean 'second'"):
        report(whole, readme=readme(whole), suite="secnd")


@pytest.mark.usefixtures("undrawn")
def test_two_suites_may_have_other_prompts(whole: Path) -> None:
    for task in fakes.TASKS:
        record = fakes.run_record("base", task, samples=False)
        scores = tuple(replace(score, protocol="label") for score in record.evaluations)
        fakes.write_run(whole / "letters", replace(record, evaluations=scores))
    report(whole)


@pytest.mark.usefixtures("undrawn")
def test_a_second_protocol_has_a_table_of_its_own(whole: Path) -> None:
    for path in (whole / "quickstart").glob("*.json"):
        record = RunRecord.read(path)
        again = [replace(s, protocol="label", samples=None) for s in record.evaluations]
        replace(record, evaluations=(*record.evaluations, *again)).write(path)
    made = report(whole, suite="quickstart")
    tables = [table for table in made.tables if table.title.startswith("quickstart: accuracy")]
    assert [table.name for table in tables] == ["main", "main-label"]
    assert ["under protocol text" in table.title for table in tables] == [True, False]
    assert (whole / "quickstart" / "tables" / "main-label.md").is_file()


def test_a_results_folder_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="furina run"):
        report(tmp_path)


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
@pytest.mark.usefixtures("undrawn")
def test_a_readme_without_its_two_marks_is_an_error_and_stays_as_it_is(
    text: str, whole: Path
) -> None:
    readme(whole).write_text(text)
    with pytest.raises(RecordError, match="must hold one line"):
        report(whole, readme=readme(whole))
    assert readme(whole).read_text() == text
    assert not (whole / "quickstart" / "tables").exists()


def test_a_missing_readme_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="does not exist"):
        fill(tmp_path / "README.md", "x")


@pytest.mark.usefixtures("undrawn")
def test_a_broken_record_is_an_error_before_anything_is_written(whole: Path) -> None:
    (whole / "quickstart" / "lora--arc_easy--seed0.json").write_text("{")
    with pytest.raises(RecordError, match="not valid JSON"):
        report(whole)
    assert not list(whole.rglob("tables"))


IMPORTS = """
import sys
from pathlib import Path
from furina.reporting import report
report(Path(sys.argv[1]))
heavy = {"torch", "lightning", "transformers", "lm_eval", "datasets"}
print(sorted(heavy & sys.modules.keys()))
"""


def test_a_report_is_made_without_importing_torch(whole: Path) -> None:
    command = [sys.executable, "-c", IMPORTS, str(whole)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_committed_files_are_those_of_the_committed_records() -> None:
    root = Path(__file__).parents[2]
    made = report(root / "results", suite="quickstart", readme=root / "README.md", check=True)
    assert len(made.files) > 200
