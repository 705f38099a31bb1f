"""Running a suite with a stand-in for its cells: what is run, in which order, and what is said."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from filelock import FileLock

from furina.errors import ConfigurationError, FurinaError
from furina.experiment import cell
from furina.experiment.config import RunConfig
from furina.records import RunRecord
from furina.records.cells import suite_cells, suite_records
from furina.suites import FailedRunsError, Folders, Suite, read_suite, run_suite
from furina.suites import cells as cells_module
from furina.suites.cells import run_one
from furina.suites.run import Progress
from tests.records.fakes import run_record
from tests.suites.helpers import lora, write_suite


@dataclass
class StandIn:
    """Return a fake record in place of a cell's, and note what was run."""

    ran: list[RunConfig] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    def __call__(self, config: RunConfig, run_dir: Path, command: str) -> RunRecord:
        self.ran.append(config)
        self.commands.append(command)
        if config.seed == 13:
            raise FurinaError("an unlucky seed")
        if config.seed == 17:
            raise ZeroDivisionError("a bug")
        made = replace(
            run_record(config.method, config.task, config.seed),
            suite=config.suite,
            config=config.resolved().to_dict(),
            command=command,
            evaluations=(),
        )
        if config.seed == 14:
            return replace(made, status="diverged", error="Training diverged", training=None)
        return made


@dataclass
class World:
    root: Path
    stand_in: StandIn

    @property
    def folders(self) -> Folders:
        return Folders(self.root / "results", self.root / "runs")

    def run(self, suite: Path | Suite) -> list[tuple[str, int]]:
        """Return (method, seed) of the cells that this call ran."""
        self.stand_in.ran.clear()
        run_suite(read_suite(suite) if isinstance(suite, Path) else suite, self.folders)
        return [(config.method, config.seed) for config in self.stand_in.ran]

    def file(self, name: str) -> Path:
        """Return the record's file of SUITE/RUN."""
        suite, _, run = name.partition("/")
        files = {cell.name: cell.file for cell in suite_cells(self.folders.results / suite)}
        return files[run]

    def record(self, name: str) -> RunRecord:
        suite, _, run = name.partition("/")
        records = suite_records(self.folders.results / suite)
        return {record.name: record for _, record in records}[run]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    stand_in = StandIn()
    monkeypatch.setattr(cell, "run_cell", stand_in)
    return World(tmp_path, stand_in)


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    files = {"base": {"method": "base"}, "lora": lora(sweep={"seed": [0, 1]})}
    return write_suite(tmp_path / "pair", {}, **files)


def test_a_finished_cell_is_skipped_and_its_record_is_there_again(
    world: World, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert world.run(pair) == [("base", 0), ("lora", 0), ("lora", 1)]
    world.file("pair/lora--arc_easy--seed1").unlink()
    capsys.readouterr()
    assert world.run(pair) == []
    assert capsys.readouterr().out.count("skipped") == 3
    assert world.record("pair/lora--arc_easy--seed1").seed == 1


def test_other_settings_are_another_cell_and_its_record_replaces_the_first(
    world: World, pair: Path
) -> None:
    first = (pair / "base.yaml").read_text()
    world.run(pair)
    (pair / "base.yaml").write_text("method: base\ntest_size: 7\n")
    assert world.run(pair) == [("base", 0)]
    assert world.record("pair/base--arc_easy--seed0").config["test_size"] == 7
    (pair / "base.yaml").write_text(first)
    assert world.run(pair) == []
    own = world.record("pair/base--arc_easy--seed0").config
    assert own["test_size"] == RunConfig().test_size


def test_suites_share_a_cell_and_each_has_its_record_under_its_own_names(
    world: World, tmp_path: Path
) -> None:
    world.run(write_suite(tmp_path / "one", {}, lora=lora()))
    assert world.run(write_suite(tmp_path / "two", {}, plain=lora())) == []
    record = world.record("two/plain--arc_easy--seed0")
    assert (record.suite, record.row, record.method) == ("two", "plain", "lora")
    assert record.command.endswith("two --rows plain")
    assert RunConfig().updated(record.config).row == "plain"
    assert world.record("one/lora--arc_easy--seed0").command.endswith("one --rows lora")
    assert world.file("one/lora--arc_easy--seed0") == world.file("two/plain--arc_easy--seed0")


def test_what_failed_is_recorded_tried_again_and_does_not_stop_the_others(
    world: World, tmp_path: Path
) -> None:
    folder = write_suite(tmp_path / "s", {}, lora=lora(sweep={"seed": [13, 17, 18]}))
    with pytest.raises(FailedRunsError) as caught:
        world.run(folder)
    assert "Of 3 runs 2 failed: lora on arc_easy, seed 13: an unlucky seed" in str(caught.value)
    assert "ZeroDivisionError: a bug" in str(caught.value)
    assert [config.seed for config in world.stand_in.ran] == [13, 17, 18]
    record = world.record("s/lora--arc_easy--seed13")
    assert (record.status, record.error, record.evaluations) == ("failed", "an unlucky seed", ())
    with pytest.raises(FailedRunsError):
        world.run(folder)
    assert [config.seed for config in world.stand_in.ran] == [13, 17]


def test_what_diverged_is_recorded_and_not_tried_again(world: World, tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "s", {}, lora=lora(seed=14))
    for attempts in (1, 0):
        with pytest.raises(FailedRunsError, match="1 diverged: lora on arc_easy, seed 14: Train"):
            world.run(folder)
        assert len(world.stand_in.ran) == attempts
    assert world.record("s/lora--arc_easy--seed14").status == "diverged"


def test_a_failure_never_replaces_the_record_of_a_success(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_suite(tmp_path / "s", {}, lora=lora())
    world.run(folder)
    before = world.file("s/lora--arc_easy--seed0").read_bytes()

    def fail(*arguments: object) -> None:
        raise FurinaError("no data")

    monkeypatch.setattr(cell, "run_cell", fail)
    elsewhere = Folders(world.folders.results, tmp_path / "other runs")
    with pytest.raises(FailedRunsError, match="no data"):
        run_suite(read_suite(folder), elsewhere)
    assert world.file("s/lora--arc_easy--seed0").read_bytes() == before


def test_a_cell_that_another_process_holds_comes_last_and_is_not_run_twice(
    world: World, pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = read_suite(pair)
    folder = world.folders.of(suite.runs[0])
    folder.parent.mkdir(parents=True)
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    lock.acquire()
    assert run_one(suite, suite.runs[0], world.folders).state == "busy"

    def released(seconds: float) -> None:
        lock.release()

    monkeypatch.setattr(cells_module.time, "sleep", released)
    assert world.run(suite) == [("lora", 0), ("lora", 1), ("base", 0)]
    assert "another process is running it" in capsys.readouterr().out


def test_two_writers_never_run_one_cell(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten threads with a file lock each stand for ten processes."""
    monkeypatch.setattr(cells_module, "BUSY_WAIT", 0.01)
    suite = read_suite(write_suite(tmp_path / "s", {}, lora=lora()))
    threads = [
        threading.Thread(target=cells_module.run_when_free, args=(suite, run, world.folders))
        for run in suite.runs * 10
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(world.stand_in.ran) == 1


def test_the_time_left_is_that_of_the_cells_that_were_run() -> None:
    said: list[str] = []
    times = iter(range(0, 10_000, 90))
    config = RunConfig(method="lora")
    progress = Progress([config] * 4, said.append, lambda: float(next(times)))
    for state in ("skipped", "finished"):
        began = progress.begin(config)
        outcome = cells_module.Outcome(state)
        progress.end(config, outcome, progress.clock() - began)
    assert said == [
        "[1/4] lora on arc_easy, seed 0",
        "  finished before: skipped",
        "[2/4] lora on arc_easy, seed 0",
        "  lora on arc_easy, seed 0 finished after 1:30 min",
        "  2 left, about 3:00 min",
    ]


def test_the_time_left_is_that_of_the_cells_most_alike() -> None:
    said: list[str] = []
    configs = [
        RunConfig(method=method, task=task)
        for method in ("base", "lora", "furina")
        for task in ("arc_easy", "openbookqa")
    ]
    progress = Progress(list(configs), said.append)
    for config, minutes in zip(configs, (1, 2, 10, 20, 12, 24), strict=True):
        progress.end(config, cells_module.Outcome("finished"), 60.0 * minutes)
    assert said[1::2] == [
        "  5 left",  # the base model's cells do not tell how long a training takes
        "  4 left",
        "  3 left, about 30:00 min",
        "  2 left, about 30:00 min",  # lora's mean for each
        "  1 left, about 12:00 min",  # furina's own
    ]


def test_a_cell_that_failed_says_nothing_of_the_time_left() -> None:
    said: list[str] = []
    config = RunConfig(method="lora")
    progress = Progress([config] * 3, said.append)
    progress.end(config, cells_module.Outcome("failed", error="no memory"), 1.0)
    progress.end(config, cells_module.Outcome("finished"), 60.0)
    assert said[1::2] == ["  2 left", "  1 left, about 1:00 min"]


def test_runs_that_would_stand_beside_another_dtype_are_refused_before_they_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = read_suite(write_suite(tmp_path / "two", {}, lora=lora())).chosen(seeds=2)
    world.run(replace(suite, runs=tuple(run.updated({"dtype": "bfloat16"}) for run in suite.runs)))
    wide = [run.updated({"dtype": "float32"}) for run in suite.runs]
    with pytest.raises(ConfigurationError, match=r"was computed in bfloat16, .* be in float32"):
        world.run(replace(suite, runs=tuple(wide[:1])))
    assert not world.stand_in.ran
    world.run(replace(suite, runs=tuple(wide)))  # which replaces them all
    assert len(world.stand_in.ran) == 2
