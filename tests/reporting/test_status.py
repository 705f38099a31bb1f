from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from furina.records import RecordError, RunRecord, Spread
from furina.reporting.compare.pairs import RowPair, row_pairs
from furina.reporting.pages.contents import load_paper
from furina.reporting.read.paper import Exhibit, PaperTable, in_order, read_index
from furina.reporting.tables.cells import Cell, Table
from furina.reporting.tables.comparison import comparison_table
from furina.reporting.tables.effort import command, effort_table
from furina.reporting.tables.status import RULES, pair_table, reproducing, status, status_table
from tests.records import fakes
from tests.reporting.frames import load_suite, rows_of

RESULTS = Path(__file__).parents[2] / "results"
PLACE = Exhibit("Table 1", "Main", "quickstart", "all", "main", "accuracy")
AGREES = RowPair("furina", 2.0, (0.5, 3.5), 4.8)
NOISE = RowPair("furina", 0.5, (-1.0, 2.0), 4.8)
OPPOSED = RowPair("furina", -2.0, (-3.5, -0.5), 4.8)
ABSENT = RowPair("slim", None, None, 5.4)


def paper(tmp_path: Path, **values: float) -> PaperTable:
    """A table of the paper with a row of each name, which is a row of ours too."""
    lines = ["source,table,row,column,value,unit,place,ours"]
    lines += [
        f"s,t,{row.upper()},mean of 3,{value},%,Table 1,{row}" for row, value in values.items()
    ]
    path = tmp_path / "main.csv"
    path.write_text("\n".join(lines) + "\n")
    return PaperTable.read(path)


def cells(table: Table, row: int = 0) -> dict[tuple[str, str], Cell]:
    return rows_of(table)[row]


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [
        (AGREES, "agrees"),
        (replace(OPPOSED, paper=-4.8), "agrees"),
        (NOISE, "within noise"),
        (replace(NOISE, interval=(0.0, 2.0)), "within noise"),
        (OPPOSED, "differs"),
        (replace(AGREES, paper=-4.8), "differs"),
        (replace(AGREES, paper=0.0), "differs"),
        (ABSENT, "not measured"),
        (replace(AGREES, interval=None), "not measured"),
    ],
)
def test_a_pair_is_judged_by_its_interval_and_the_papers_sign(pair: RowPair, verdict: str) -> None:
    assert pair.verdict == verdict


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([AGREES], "reproduced"),
        ([AGREES, AGREES], "reproduced"),
        ([AGREES, NOISE], "within noise"),
        ([NOISE, NOISE], "within noise"),
        ([AGREES, OPPOSED], "differs"),
        ([NOISE, OPPOSED, ABSENT], "differs"),
        ([AGREES, ABSENT], "undecided"),
        ([NOISE, ABSENT], "undecided"),
        ([], "undecided"),
    ],
)
def test_a_status_follows_from_the_pairs(pairs: list[RowPair], expected: str, folder: Path) -> None:
    assert status([pair.verdict for pair in pairs]) == expected
    row = cells(status_table([PLACE], [load_suite(folder)], {"quickstart": pairs}))
    assert row["", "status"].text == expected
    assert expected in RULES
    for name in ("agrees", "within noise", "differs", "not measured"):
        count = sum(pair.verdict == name for pair in pairs)
        assert row["row pairs", name].numbers[""] == count


def test_a_place_without_records_is_not_run_and_says_how_to_run_it() -> None:
    row = cells(status_table([replace(PLACE, suite="main")], [], {}))
    assert row["", "status"].text == "not run"
    assert row["", "command"].text == "furina run main --scale cpu"
    assert row["row pairs", "agrees"].numbers[""] is None


def test_a_place_whose_runs_all_failed_is_not_run_and_says_so(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        replace(RunRecord.read(path), status="failed", error="killed").write(path)
    row = cells(status_table([PLACE], [load_suite(folder)], {"quickstart": [AGREES]}))
    assert row["", "status"].text == "not run"
    assert "6 of 6 runs failed or diverged" in row["", "status"].notes


def test_the_reasons_to_doubt_a_status_are_its_notes(folder: Path) -> None:
    record = fakes.run_record("lora", "openbookqa")
    scores = tuple(replace(score, suspect=True) for score in record.evaluations)
    dirty = replace(record.provenance, dirty=True)
    fakes.write_run(folder, replace(record, evaluations=scores, provenance=dirty))
    fakes.write_run(folder, replace(fakes.run_record("furina", "arc_easy"), status="diverged"))
    place = replace(PLACE, numbers="partly")
    table = status_table([place], [load_suite(folder)], {"quickstart": [AGREES, ABSENT]})
    assert cells(table)["", "status"].notes == (
        "the paper's numbers are known to us partly",
        "no difference with an interval: slim",
        "fewer than 3 seeds: the spread over seeds is hardly known",
        "3 of 8 scores are not above chance",  # the base model's own one, and LoRA's two
        "1 of 6 runs failed or diverged",
        "1 of 5 runs are from a working tree with uncommitted changes",
    )


def test_a_missing_reference_row_is_a_reason(folder: Path) -> None:
    notes = cells(status_table([PLACE], [load_suite(folder)], {}))["", "status"].notes
    assert "the row that the paper's others are compared with has not been run" in notes


def test_three_clean_seeds_leave_nothing_to_doubt(tmp_path: Path) -> None:
    for path in fakes.write_suite(tmp_path / "main", seeds=(0, 1, 2)):
        record = RunRecord.read(path)
        scores = tuple(replace(score, suspect=False) for score in record.evaluations)
        replace(record, evaluations=scores).write(path)
    suite = load_suite(tmp_path / "main")
    row = cells(status_table([replace(PLACE, suite="main")], [suite], {"main": [AGREES]}))
    assert row["", "status"].notes == ()
    assert row["", "seeds"].text == "3"


def test_each_scale_and_backbone_of_a_place_has_a_line(tmp_path: Path) -> None:
    names = ["main-cpu", "main-paper-qwen2-7b", "mainly-cpu", "quickstart"]
    for name in names:
        fakes.write_suite(tmp_path / name)
    suites = [load_suite(tmp_path / name) for name in names]
    table = status_table([replace(PLACE, suite="main")], suites, {})
    shown = [(row["", "suite"].text, row["", "scale"].text) for row in rows_of(table)]
    assert shown == [("main-cpu", "cpu"), ("main-paper-qwen2-7b", "paper-qwen2-7b")]
    assert any("scale cpu" in note for note in cells(table)["", "status"].notes)
    assert not any("scale cpu" in note for note in cells(table, 1)["", "status"].notes)


def test_folders_stand_in_the_papers_order() -> None:
    places = [replace(PLACE, suite="zeta"), replace(PLACE, suite="alpha")]
    folders = ["alpha-cpu", "beta", "zeta-paper", "zeta-cpu"]
    assert in_order(folders, places) == ["zeta-cpu", "zeta-paper", "alpha-cpu", "beta"]


def test_pairs_are_our_differences_with_intervals_beside_the_papers(
    folder: Path, tmp_path: Path
) -> None:
    suite = load_suite(folder)
    theirs = paper(tmp_path, lora=78.8, furina=83.6, slim=84.2)
    furina, slim = row_pairs(suite, theirs, "accuracy")
    means = {
        row: sum(
            100 * score.value
            for run in suite.select(row)
            for score in run.record.evaluations
            if score.variant == "merged"
        )
        / 2
        for row in ("lora", "furina")
    }
    assert (furina.row, furina.paper) == ("furina", pytest.approx(4.8))
    assert furina.difference == pytest.approx(means["furina"] - means["lora"])
    assert furina.interval is not None
    assert furina.interval[0] < furina.difference < furina.interval[1]
    assert (slim.row, slim.difference, slim.interval) == ("slim", None, None)


def test_without_the_reference_row_there_are_no_pairs(folder: Path, tmp_path: Path) -> None:
    assert row_pairs(load_suite(folder), paper(tmp_path, dora=1.0, slim=2.0), "accuracy") == []


def test_a_forgotten_task_is_compared_as_a_drop_of_the_bases_accuracy(tmp_path: Path) -> None:
    """Tuned on ARC-Easy, scored on OpenBookQA: a row that is better forgets less."""
    folder = tmp_path / "forgetting-cpu"
    for row in ("base", "lora", "furina"):
        tuned, other = (fakes.run_record(row, task) for task in fakes.TASKS)
        data = (tuned.data[0], replace(other.data[0], train_sha256=None))
        evaluations = (*tuned.evaluations, *other.evaluations)
        fakes.write_run(folder, replace(tuned, data=data, evaluations=evaluations))
        for score in other.evaluations:
            assert score.samples
            answers = fakes.correct(row, "openbookqa", 0, int(score.variant == "merged"))
            fakes.write_samples(folder / score.samples, "acc", answers)
    suite = load_suite(folder)
    (pair,) = row_pairs(suite, paper(tmp_path, lora=10.1, furina=2.0), "drop")
    found = {
        row: next(
            score.value
            for score in suite.select(row)[0].record.evaluations
            if score.task == "openbookqa" and score.variant in ("base", "merged")
        )
        for row in ("base", "lora", "furina")
    }
    drops = {row: 100 * (found["base"] - value) / found["base"] for row, value in found.items()}
    assert pair.difference == pytest.approx(drops["furina"] - drops["lora"])
    assert pair.paper == pytest.approx(-8.1)
    assert pair.interval is not None
    assert pair.interval[0] < pair.difference < pair.interval[1]


def test_a_mixture_without_its_router_is_a_row_of_the_papers(tmp_path: Path) -> None:
    """Its record is SLIM's, of another variant; the base is right on every third question."""
    folder = tmp_path / "router_removed-cpu"
    answers = {"base": [i % 3 == 0 for i in range(300)], "slim": [i % 2 == 0 for i in range(300)]}
    for row, right in answers.items():
        fakes.write_row(folder, row, "arc_easy", right)
    file, none = "samples/removed.jsonl.gz", [False] * 300
    fakes.write_samples(folder / file, "acc", none)
    path = folder / "slim--arc_easy--seed0.json"
    record = RunRecord.read(path)
    trained = next(score for score in record.evaluations if score.variant == "unmerged")
    removed = fakes.score("router_removed", "arc_easy", none, file)
    replace(record, evaluations=(trained, removed)).write(path)
    theirs = PaperTable.read(RESULTS / "paper" / "router_removed.csv")
    pairs = {pair.row: pair for pair in row_pairs(load_suite(folder), theirs, "removal")}
    assert set(pairs) == {"slim", "furina", "slim, router removed"}
    assert pairs["slim"].difference == pytest.approx(100 * (1 / 2 - 1 / 3))
    assert pairs["slim"].verdict == "agrees"
    without = pairs["slim, router removed"]
    assert without.difference == pytest.approx(-100 / 3)
    assert without.interval is not None
    assert without.interval[0] < -100 / 3 < without.interval[1] < 0
    assert (without.paper, without.verdict) == (pytest.approx(37.4 - 67.5), "agrees")
    assert pairs["furina"].verdict == "not measured"
    suite = load_suite(folder)
    table = pair_table(suite, theirs, "removal", list(pairs.values()), "base")
    assert table is not None
    shown = {row["", "row"].text: row for row in rows_of(table)}
    line, gap = shown["slim, router removed"], "difference to base, points"
    assert line["ours", "%"].text == "0.0" and line["in the paper", "%"].text == "37.4"
    assert line["in the paper", gap].text == "-30.1" and line["", "verdict"].text == "agrees"
    low, high = without.interval
    assert line["ours", gap].text == f"-33.3 [{low:+.1f}, {high:+.1f}]"
    assert shown["furina"]["ours", gap].notes == ("not measured",)
    beside = comparison_table(suite, theirs)
    assert beside is not None
    assert [row["", "row"].text for row in rows_of(beside)] == ["base", "slim", "furina"]
    assert "SLIM, merged without its router: in the tables router_removed and pairs." in (
        beside.remarks
    )


def time_pair(folder: Path, tmp_path: Path) -> RowPair:
    (pair,) = row_pairs(load_suite(folder), paper(tmp_path, lora=800, furina=900), "time")
    return pair


def timed(folder: Path, method: str, base: float, times: float, width: float, n: int = 9) -> None:
    """Let every run of a method have taken `times` the base model's time."""
    for path in sorted(folder.glob(f"{method}--*.json")):
        record = RunRecord.read(path)
        spreads = {
            name: Spread(middle, middle * (1 - width / 2), middle * (1 + width / 2), n)
            for name, middle in (("base", base), ("unmerged", 9 * base), ("merged", times * base))
        }
        latency = tuple(replace(t, total_ms=spreads[t.variant]) for t in record.latency)
        replace(record, latency=latency).write(path)


@pytest.mark.parametrize(
    ("lora", "furina", "verdict"),
    [(1.0, 1.5, "agrees"), (1.0, 1.01, "within noise"), (2.0, 1.0, "differs")],
)
def test_times_are_compared_over_those_of_the_base_beside(
    folder: Path, tmp_path: Path, lora: float, furina: float, verdict: str
) -> None:
    timed(folder, "lora", base=4000, times=lora, width=0.05)  # while the machine was slow
    timed(folder, "furina", base=1000, times=furina, width=0.05)
    pair = time_pair(folder, tmp_path)
    assert (pair.verdict, pair.paper) == (verdict, 100)
    bases = [
        t.total_ms.median for run in load_suite(folder).runs for t in run.record.latency
        if t.variant == "base"
    ]  # fmt: skip
    base = statistics.median(bases)
    assert pair.difference == pytest.approx(base * (furina - lora))


def test_the_interval_of_times_is_that_of_simulated_medians(folder: Path, tmp_path: Path) -> None:
    # the deviation of simulated medians of normal repeats, n of each, against the interval
    n, deviation, rng = 25, 0.04, np.random.default_rng(0)
    width = deviation * 2 * statistics.NormalDist().inv_cdf(0.75)
    for method in ("lora", "furina"):
        timed(folder, method, base=1000, times=1.0, width=width, n=n)
    suite = load_suite(folder)
    runs = len(suite.select("furina"))
    medians = np.median(rng.normal(1.0, deviation, (4, runs, 4000, n)), axis=-1)
    simulated = (medians[0] / medians[1] - medians[2] / medians[3]).mean(axis=0).std()
    pair = time_pair(folder, tmp_path)
    assert pair.interval is not None
    base = statistics.median(
        t.total_ms.median for run in suite.runs for t in run.record.latency if t.variant == "base"
    )
    half = (pair.interval[1] - pair.interval[0]) / 2 / base
    assert half == pytest.approx(1.96 * simulated, rel=0.1)


@pytest.mark.parametrize("absent", ["times", "repeats"])
def test_times_that_are_absent_or_too_few_decide_nothing(
    folder: Path, tmp_path: Path, absent: str
) -> None:
    if absent == "repeats":
        timed(folder, "furina", base=1000, times=1.5, width=0.05, n=4)
    else:
        for path in sorted(folder.glob("furina--*.json")):
            replace(RunRecord.read(path), latency=()).write(path)
    pair = time_pair(folder, tmp_path)
    assert (pair.difference, pair.verdict, pair.paper) == (None, "not measured", 100)


def test_the_effort_is_the_sum_over_runs(folder: Path) -> None:
    suite = load_suite(folder)
    row = cells(effort_table([suite]))
    seconds = [run.record.training.seconds for run in suite.runs if run.record.training]
    assert row["training", "minutes"].numbers[""] == pytest.approx(sum(seconds) / 60)
    assert row["wall clock", "hours"].numbers[""] == pytest.approx(6 * 6 / 60)
    assert row["runs", "all"].numbers[""] == 6
    assert "Example CPU" in row["", "machine"].text
    assert "torch 2.13.0" in row["", "versions"].text


def test_a_run_that_two_suites_share_counts_once_in_all(folder: Path, tmp_path: Path) -> None:
    fakes.write_suite(tmp_path / "second")
    fakes.write_suite(tmp_path / "third", seeds=(0, 1))
    suites = [load_suite(each) for each in (folder, tmp_path / "second", tmp_path / "third")]
    table = effort_table(suites)
    assert [row["runs", "all"].numbers[""] for row in rows_of(table)] == [6, 6, 10, 10]


def test_the_effort_tells_runs_of_two_dtypes_apart(folder: Path, tmp_path: Path) -> None:
    for path in fakes.write_suite(tmp_path / "wide"):
        record = RunRecord.read(path)
        replace(record, config={**record.config, "dtype": "float32"}).write(path)
    rows = rows_of(effort_table([load_suite(folder), load_suite(tmp_path / "wide")]))
    assert [row["runs", "all"].numbers[""] for row in rows] == [6, 6, 12]
    name = "smollm2-135m-instruct in"
    shown = [f"{name} bfloat16", f"{name} float32", f"{name} bfloat16; {name} float32"]
    assert [row["", "backbone"].text for row in rows] == shown


def test_the_command_runs_the_whole_suite(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        record = RunRecord.read(path)
        words = f"furina run main --scale cpu --rows {record.method}"
        replace(record, command=words).write(path)
    assert command(load_suite(folder)) == "furina run main --scale cpu"


def test_the_page_holds_rules_statuses_and_efforts(folder: Path) -> None:
    suite = load_suite(folder)
    tables = status_table([PLACE], [suite], {"quickstart": [NOISE]}), effort_table([suite])
    text = reproducing(*tables)
    assert all(rule in text for rule in RULES.values())
    assert re.search(r"\| Table 1 \| Main \| quickstart \|.*\| within noise", text)
    assert text == reproducing(*tables)


def test_the_committed_list_has_every_table_and_figure_of_the_paper() -> None:
    found = load_paper(RESULTS)
    places = [place.place for place in found]
    expected = [f"Table {n}" for n in (1, 2, 3, 4, 5, 5, 6, 7)] + [f"Figure {n}" for n in (1, 2, 3)]
    assert places == expected
    for place, theirs in found.items():
        assert theirs is None or theirs.place == place.place
    files = {path.stem for path in (RESULTS / "paper").glob("*.csv")} - {"index"}
    assert {place.file for place in found if place.file} == files


@pytest.mark.parametrize("place", load_paper(RESULTS), ids=lambda place: place.suite)
def test_every_place_has_a_suite_that_repeats_it(place: Exhibit) -> None:
    assert (RESULTS.parent / "experiments" / place.suite / "defaults.yaml").is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Table 1,T,main,some,main,accuracy", "numbers is 'some'"),
        ("Table 1,T,main,all,main,acuracy", "Did you mean 'accuracy'"),
        ("Table 1,T,main,none,main,accuracy", "needs numbers, file and measure"),
        ("Table 1,T,main,all,,", "needs numbers, file and measure"),
        ("Table 1,T", "must have 6 columns"),
    ],
)
def test_a_damaged_list_of_places_is_one_sentence(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "index.csv"
    path.write_text(f"place,title,suite,numbers,file,measure\n{line}\n")
    with pytest.raises(RecordError, match=message):
        read_index(path)


def test_the_log_names_files_that_are_there() -> None:
    text = (RESULTS / "LOG.md").read_text()
    named = re.findall(r"`(results/[^`]+)`", text)
    assert len(named) > 5
    assert [name for name in named if not (RESULTS.parent / name).exists()] == []
