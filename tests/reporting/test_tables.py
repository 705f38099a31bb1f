from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import Provenance, RecordError, RunRecord, Status, Variant
from furina.reporting.read import scores as numbers
from furina.reporting.read.scores import read_correct
from furina.reporting.tables import notes
from furina.reporting.tables import scores as accuracy
from furina.reporting.tables.cells import Cell, Table
from furina.reporting.tables.details import latency_table, merge_table
from furina.reporting.tables.main import main_table
from tests.records import fakes
from tests.reporting.frames import load_suite, rows_of

ARC = "arc_easy acc, %"


def cell(table: Table, method: str, group: str, column: str) -> Cell:
    for row in rows_of(table):
        if row["", "method"].text == method:
            found = row[group, column]
            assert isinstance(found, Cell)
            return found
    raise AssertionError(f"no row {method}")


def rewrite(folder: Path, record: RunRecord) -> Table:
    fakes.write_run(folder, record)
    return main_table(load_suite(folder))


def test_there_is_one_row_per_method_with_base_first(folder: Path) -> None:
    table = main_table(load_suite(folder))
    methods = [method.text for method in table.frame["", "method"]]
    assert methods == ["base", "lora", "furina"]


def test_unmerged_and_merged_accuracy_are_those_of_their_own_scorings(folder: Path) -> None:
    table = main_table(load_suite(folder))
    record = RunRecord.read(folder / "furina--arc_easy--seed0.json")
    for score in record.evaluations:
        shown = cell(table, "furina", ARC, score.variant)
        assert shown.numbers[""] == pytest.approx(100 * score.value)
        assert shown.numbers["stderr"] == pytest.approx(100 * score.stderr)
        assert shown.numbers["n"] == score.n
        assert shown.text == f"{100 * score.value:.1f} ± {100 * score.stderr:.1f}"


def test_one_seed_is_marked_as_one(folder: Path, seeded: Path) -> None:
    seeds = cell(main_table(load_suite(folder)), "lora", "", "seeds")
    assert (seeds.text, seeds.notes) == ("1", (notes.ONE_SEED,))
    seeds = cell(main_table(load_suite(seeded)), "lora", "", "seeds")
    assert (seeds.text, seeds.notes) == ("3", ())
    for path in seeded.glob("lora--*--seed2.json"):
        path.unlink()
    seeds = cell(main_table(load_suite(seeded)), "lora", "", "seeds")
    assert (seeds.text, seeds.notes) == ("2", (notes.TWO_SEEDS,))


def test_several_seeds_show_their_mean_deviation_and_number(seeded: Path) -> None:
    records = [RunRecord.read(path) for path in seeded.glob("lora--arc_easy--*.json")]
    values = [100 * record.evaluations[0].value for record in records]
    shown = cell(main_table(load_suite(seeded)), "lora", ARC, "unmerged")
    assert shown.numbers[""] == pytest.approx(statistics.fmean(values))
    assert shown.numbers["sd over seeds"] == pytest.approx(statistics.stdev(values))
    assert shown.text.endswith(f"(sd {statistics.stdev(values):.1f}, 3 seeds)")


def test_the_gain_is_paired_over_questions(folder: Path) -> None:
    suite = load_suite(folder)
    outputs = []
    for method, variant in (("furina", "unmerged"), ("base", "base")):
        run = suite.select(method, "arc_easy")[0]
        score = run.score(variant, "arc_easy", "text", "acc")
        assert score
        found = read_correct(run, score)
        assert found
        outputs.append(found)
    differences = [outputs[0][key] - outputs[1][key] for key in outputs[0]]
    stderr = statistics.stdev(differences) / len(differences) ** 0.5
    shown = cell(main_table(suite), "furina", ARC, "gain")
    assert shown.numbers["in stderr"] == pytest.approx(statistics.fmean(differences) / stderr)
    assert shown.notes == ()


def test_a_gain_without_per_question_outputs_is_unpaired_and_says_so(folder: Path) -> None:
    paired = cell(main_table(load_suite(folder)), "lora", ARC, "gain")
    table = rewrite(folder, fakes.run_record("base", "arc_easy", samples=False))
    shown = cell(table, "lora", ARC, "gain")
    assert shown.notes == (accuracy.UNPAIRED,)
    assert shown.numbers[""] == pytest.approx(paired.numbers[""])
    assert shown.numbers["stderr"] != pytest.approx(paired.numbers["stderr"])


def test_the_gain_over_several_seeds_uses_each_questions_mean(seeded: Path) -> None:
    shown = cell(main_table(load_suite(seeded)), "lora", ARC, "gain")
    one_seed = numbers.gain(load_suite(seeded), "lora", "arc_easy")
    assert one_seed
    means = [
        statistics.fmean(answers)
        for answers in zip(*(fakes.correct("lora", "arc_easy", s) for s in range(3)), strict=True)
    ]
    base = fakes.correct("base", "arc_easy", 0)
    differences = [ours - theirs for ours, theirs in zip(means, base, strict=True)]
    assert shown.numbers[""] == pytest.approx(100 * statistics.fmean(differences))
    stderr = 100 * statistics.stdev(differences) / len(differences) ** 0.5
    assert shown.numbers["stderr"] == pytest.approx(stderr)


def test_other_questions_cannot_be_paired(folder: Path) -> None:
    run = load_suite(folder).select("lora", "arc_easy")[0]
    samples = run.record.evaluations[0].samples
    assert samples
    path = folder / samples
    answers = fakes.correct("lora", "arc_easy", 0)
    fakes.write_samples(path, "acc", answers, first_id=1)
    with pytest.raises(RecordError, match="different questions"):
        main_table(load_suite(folder))


def test_a_score_at_chance_is_marked(folder: Path) -> None:
    suite = load_suite(folder)
    table = main_table(suite)
    for method in suite.rows:
        for task in suite.tasks:
            for _, score in numbers.scores(suite, method, task, "unmerged"):
                shown = cell(table, method, f"{task} acc, %", "unmerged")
                assert any("chance (25.0 %)" in note for note in shown.notes) == score.suspect
        suspects = {
            task
            for task in suite.tasks
            for _, score in numbers.scores(suite, method, task, "unmerged")
            if score.suspect
        }
        mean = cell(table, method, f"mean of {len(suite.tasks)} tasks, %", "unmerged")
        said = (f"not above chance on {', '.join(sorted(suspects))}",)
        assert mean.notes == (said if suspects else ())
    assert any("chance (25.0 %)" in note for note in table.footnotes)
    assert any("not above chance on" in note for note in table.footnotes)


def test_a_score_that_is_older_than_a_change_is_marked(folder: Path) -> None:
    (folder.parent / "numerics.csv").write_text(
        "date,area,what\n2099-01-01T00:00:00+00:00,training/furina,the norms are fused\n"
    )
    table = main_table(load_suite(folder))
    stale = ("made before: the norms are fused",)
    assert cell(table, "furina", ARC, "merged").notes == stale
    assert cell(table, "furina", ARC, "gain").notes == stale
    assert cell(table, "furina", "training", "s per step").notes == ()
    assert cell(table, "lora", ARC, "merged").notes == ()


def test_times_that_are_older_than_a_change_of_them_are_marked(folder: Path) -> None:
    (folder.parent / "numerics.csv").write_text(
        "date,area,what\n2099-01-01T00:00:00+00:00,time/generation,one token is faster\n"
        "2099-01-02T00:00:00+00:00,time/training,the clock stops\n"
    )
    table = main_table(load_suite(folder))
    for row, variant in (("base", "unmerged"), ("lora", "unmerged"), ("lora", "merged")):
        shown = cell(table, row, "time per token, ms", variant)
        assert shown.notes == ("made before: one token is faster",)
    for column in ("s per step", "minutes"):
        assert cell(table, "lora", "training", column).notes == ("made before: the clock stops",)
    assert cell(table, "lora", "training", "peak memory, GB").notes == ()
    assert cell(table, "lora", ARC, "merged").notes == ()


def test_some_seeds_at_chance_are_counted(seeded: Path) -> None:
    record = fakes.run_record("lora", "arc_easy", 1)
    scores = tuple(replace(score, suspect=True) for score in record.evaluations)
    shown = cell(rewrite(seeded, replace(record, evaluations=scores)), "lora", ARC, "merged")
    assert shown.notes[0].endswith("in 1 of 3 seeds")


def test_a_cell_without_a_record_is_a_dash_with_the_reason(folder: Path) -> None:
    (folder / "lora--openbookqa--seed0.json").unlink()
    table = main_table(load_suite(folder))
    for column in ("unmerged", "merged", "gain"):
        shown = cell(table, "lora", "openbookqa acc, %", column)
        assert (shown.text, shown.notes) == ("–", (notes.NO_RECORD,))


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_a_run_without_a_result_is_listed_and_not_dropped(status: Status, folder: Path) -> None:
    record = replace(
        fakes.run_record("lora", "openbookqa"),
        status=status,
        error="the loss was not finite at step 12",
        evaluations=(),
    )
    table = rewrite(folder, record)
    shown = cell(table, "lora", "openbookqa acc, %", "unmerged")
    assert (shown.text, shown.notes) == ("–", (notes.NO_RESULT,))
    line = f"lora on openbookqa, seed 0 {status}: the loss was not finite at step 12"
    assert any(line in remark for remark in table.remarks)


def test_a_method_with_only_failed_runs_keeps_its_row(folder: Path) -> None:
    for task in fakes.TASKS:
        record = replace(fakes.run_record("lora", task), status="failed", evaluations=())
        fakes.write_run(folder, replace(record, training=None, merge=None, latency=()))
    table = main_table(load_suite(folder))
    row = next(r for r in rows_of(table) if r["", "method"].text == "lora")
    assert {c.text for c in row.values()} == {"lora", "–"}


def test_without_base_there_is_no_gain(folder: Path) -> None:
    for path in folder.glob("base--*.json"):
        path.unlink()
    table = main_table(load_suite(folder))
    assert cell(table, "lora", ARC, "gain").notes == (accuracy.NO_BASE_SCORE,)


def test_a_run_from_a_dirty_tree_is_marked(folder: Path) -> None:
    clean = fakes.PROVENANCE
    assert notes.DIRTY not in main_table(load_suite(folder)).footnotes
    dirty = replace(clean, dirty=True)
    table = rewrite(folder, replace(fakes.run_record("lora", "arc_easy"), provenance=dirty))
    assert cell(table, "lora", "", "method").notes == (notes.DIRTY,)
    assert cell(table, "furina", "", "method").notes == ()


def test_a_run_from_outside_a_checkout_is_marked(folder: Path) -> None:
    unknown: Provenance = replace(fakes.PROVENANCE, commit=None, dirty=None)
    table = rewrite(folder, replace(fakes.run_record("lora", "arc_easy"), provenance=unknown))
    assert cell(table, "lora", "", "method").notes == (notes.NO_COMMIT,)


@pytest.mark.parametrize("variant", ["unmerged", "merged"])
def test_a_time_has_its_ratio_to_the_base_model_of_the_same_run(
    variant: Variant, folder: Path
) -> None:
    records = [RunRecord.read(path) for path in sorted(folder.glob("furina--*.json"))]
    times = [{t.variant: t.total_ms.median for t in record.latency} for record in records]
    shown = cell(main_table(load_suite(folder)), "furina", "total time, ms", variant)
    assert shown.numbers[""] == pytest.approx(statistics.median(t[variant] for t in times))
    ratio = statistics.median(t[variant] / t["base"] for t in times)
    assert shown.numbers["ratio to base"] == pytest.approx(ratio)
    assert shown.text.endswith(f"({ratio:.2f}×)")


def test_a_time_without_base_in_its_run_has_no_ratio_and_says_so(folder: Path) -> None:
    for task in fakes.TASKS:
        record = fakes.run_record("lora", task)
        without = tuple(time for time in record.latency if time.variant != "base")
        fakes.write_run(folder, replace(record, latency=without))
    shown = cell(main_table(load_suite(folder)), "lora", "total time, ms", "merged")
    assert "×" not in shown.text
    assert shown.numbers["ratio to base"] is None
    assert "no ratio" in shown.notes[0]


def test_untimed_runs_are_dashes(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        replace(RunRecord.read(path), latency=()).write(path)
    suite = load_suite(folder)
    table = main_table(suite)
    for method in suite.rows:
        assert cell(table, method, "total time, ms", "unmerged").text == "–"
    assert latency_table(suite) is None


def test_cost_columns_are_those_of_training(folder: Path) -> None:
    table = main_table(load_suite(folder))
    records = [RunRecord.read(path) for path in folder.glob("lora--*.json")]
    trained = [record.training for record in records if record.training]
    assert cell(table, "lora", "", "trainable").numbers[""] == fakes.TRAINABLE["lora"]
    minutes = statistics.fmean(training.seconds for training in trained) / 60
    assert cell(table, "lora", "training", "minutes").numbers[""] == pytest.approx(minutes)
    step = statistics.fmean(training.seconds / training.steps for training in trained)
    assert cell(table, "lora", "training", "s per step").numbers[""] == pytest.approx(step)
    peak = max(training.peak_memory_bytes for training in trained) / 1e9
    assert cell(table, "lora", "training", "peak memory, GB").numbers[""] == pytest.approx(peak)
    assert cell(table, "lora", "training", "steps").text == "60"


def test_a_cell_with_cut_prompts_says_how_many(folder: Path) -> None:
    path = folder / "lora--arc_easy--seed0.json"
    record = RunRecord.read(path)
    cut = tuple(replace(score, truncated=7) for score in record.evaluations)
    replace(record, evaluations=cut).write(path)
    table = main_table(load_suite(folder))
    assert cell(table, "lora", ARC, "unmerged").notes == (
        "7 prompts were longer than the model reads and lost their start",
    )
    assert cell(table, "furina", ARC, "unmerged").notes == ()


def test_remarks_say_on_what_the_numbers_were_taken(folder: Path) -> None:
    text = " ".join(main_table(load_suite(folder)).remarks)
    for part in (
        "arc_easy: 600 items (test-600-seed0)",
        "100 tokens in and 100 out",
        "smollm2-135m-instruct",
        "protocol text version 1",
        "lm-eval 0.4.13",
        fakes.PROVENANCE.hardware.cpu,
        "0123456789",
    ):
        assert part in text


def test_the_backbone_is_that_of_a_run_that_loaded_it(folder: Path) -> None:
    record = fakes.run_record("base", "arc_easy")
    unknown = replace(record.backbone, sha256="")
    failed = replace(record, status="failed", evaluations=(), data=(), backbone=unknown)
    table = rewrite(folder, failed)
    assert any("(sha256 bbbbbbbbbbbb)" in remark for remark in table.remarks)


def test_the_latency_table_has_every_timed_model_with_its_quartiles(folder: Path) -> None:
    suite = load_suite(folder)
    table = latency_table(suite)
    assert table
    timed = [time for run in suite.runs for time in run.record.latency]
    assert len(table.frame) == len(timed)
    first = table.frame.iloc[0]["", "total"]
    assert first.numbers.keys() == {"", "q1", "q3"}


def test_the_merge_table_has_every_merged_run(folder: Path) -> None:
    table = merge_table(load_suite(folder))
    assert table
    assert [c.text for c in table.frame["", "method"]] == ["lora", "lora", "furina", "furina"]
    assert {c.text for c in table.frame["answers", "changed"]} == {"1"}


def test_without_merged_runs_there_is_no_merge_table(folder: Path) -> None:
    for path in folder.glob("*.json"):
        replace(RunRecord.read(path), merge=None).write(path)
    assert merge_table(load_suite(folder)) is None
