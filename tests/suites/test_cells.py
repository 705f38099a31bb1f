"""Suites run for real, on the tiny Llama: the records of each study, and the report of them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from furina.errors import FurinaError
from furina.experiment import cell
from furina.records import SearchRecord, SelectionRecord
from furina.records.cells import suite_records
from furina.reporting import OutdatedReportError, report
from furina.suites import Folders, read_suite, run_suite
from tests.experiment.helpers import OPTIONS, SIZES, SMALL, time_few_tokens, write_data
from tests.suites.helpers import SEARCH, lora, write_suite


class World(NamedTuple):
    root: Path
    folders: Folders
    failure: str

    @property
    def results(self) -> Path:
        return self.folders.results


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Results of a suite of cells of which one diverges, a search and a selection study."""
    root = tmp_path_factory.mktemp("world")
    folders = Folders(root / "results", root / "runs")
    shared = {**SMALL, "steps": 2, "data_dir": write_data(root / "data")}
    base, furina = {"method": "base"}, {"method": "furina", "adapter": OPTIONS["furina"]}
    wild = lora(learning_rate=1e30, warmup_steps=0)
    write_suite(root / "own", shared, lora=wild, base=base, furina=furina)
    options = {**furina["adapter"], "magnitude_lr_multiplier": 2.0}
    write_suite(
        root / "search", {**shared, **SEARCH}, a=wild, b=base, c={**furina, "adapter": options}
    )
    sweep = {"adapter.selection_coefficient": [0.01, 0.0]}
    write_suite(root / "selection", {**shared, "study": "selection"}, c={**furina, "sweep": sweep})
    with pytest.MonkeyPatch.context() as patch:
        time_few_tokens(patch)
        for name in ("search", "selection"):
            run_suite(read_suite(root / name), folders)
        with pytest.raises(FurinaError) as caught:
            run_suite(read_suite(root / "own"), folders)
        yield World(root, folders, str(caught.value))


def test_a_diverged_cell_leaves_its_record_and_the_others_are_run(world: World) -> None:
    assert "Of 3 runs 1 diverged: lora on arc_easy, seed 0: Training diverged" in world.failure
    records = {r.method: r for _, r in suite_records(world.results / "own")}
    assert {method: record.status for method, record in records.items()} == {
        "base": "success",
        "furina": "success",
        "lora": "diverged",
    }
    assert records["base"].command == f"furina run {world.root / 'own'} --rows base"
    assert {s.variant for s in records["furina"].evaluations} == {"unmerged", "merged"}


def test_no_cell_runs_again(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(cell, "run_cell", fail)
    with pytest.raises(FurinaError, match="Of 3 runs 1 diverged"):
        run_suite(read_suite(world.root / "own"), world.folders)
    assert capsys.readouterr().out.count("skipped") == 2


def test_a_search_writes_its_trials(world: World) -> None:
    files = (world.results / "search").glob("*.json")
    trials = {trial.method: trial for trial in map(SearchRecord.read, files)}
    assert trials.keys() == {"base", "furina", "lora"}
    assert trials["lora"].value is None and trials["base"].value is not None
    assert (trials["furina"].magnitude_multiplier, trials["furina"].steps) == (2.0, 2)


def test_a_selection_study_writes_its_runs(world: World) -> None:
    runs = [SelectionRecord.read(file) for file in (world.results / "selection").glob("*.json")]
    by_coefficient = {run.coefficient: run for run in runs}
    assert by_coefficient.keys() == {0.01, 0.0}
    assert by_coefficient[0.01].gradient_ratio is not None
    assert by_coefficient[0.0].gradient_ratio is None
    assert len({run.top_k_share for run in runs}) == 2


def test_the_report_is_made_from_it_and_holds_right_afterwards(world: World) -> None:
    readme = world.root / "README.md"
    readme.write_text("<!-- furina:table begin -->\n<!-- furina:table end -->\n")
    made = report(world.results, readme=readme)
    tables = {path.parent.parent.name for path in made.files if path.parent.name == "tables"}
    assert tables == {"own", "search", "selection"}
    text = readme.read_text()
    assert "furina" in text and "lora" in text and "base" in text
    report(world.results, readme=readme, check=True)
    readme.write_text(text.replace("base", "basis", 1))
    with pytest.raises(OutdatedReportError, match="README"):
        report(world.results, readme=readme, check=True)


def test_full_scores_every_test_question(world: World) -> None:
    suite = read_suite(world.root / "own").chosen(["base"], full=True)
    (file,) = run_suite(suite, Folders(world.results / "all", world.folders.runs))
    ((stored, record),) = suite_records(world.results / "all" / "own-full")
    assert stored == file and record.suite == "own-full"
    assert {score.n for score in record.evaluations} == {SIZES["test"]}
    assert record.data[0].test_subset == "full"
