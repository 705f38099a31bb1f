from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from furina.records import RecordError, RunRecord
from furina.reporting.read import scores as numbers
from furina.reporting.read.scores import read_correct
from furina.reporting.tables import notes
from furina.reporting.tables import scores as accuracy
from tests.records import fakes
from tests.reporting.frames import load_suite

Edit = Callable[[RunRecord], RunRecord]


def rescored(**changes: object) -> Edit:
    def edit(record: RunRecord) -> RunRecord:
        scores = tuple(replace(score, **changes) for score in record.evaluations)  # type: ignore[arg-type]
        return replace(record, evaluations=scores)

    return edit


def retimed(**changes: int) -> Edit:
    def edit(record: RunRecord) -> RunRecord:
        times = tuple(replace(latency, **changes) for latency in record.latency)  # type: ignore[arg-type]
        return replace(record, latency=times)

    return edit


def rerowed(**changes: str) -> Edit:
    return lambda r: replace(r, data=tuple(replace(data, **changes) for data in r.data))


MIXTURES: dict[str, Edit] = {
    "the protocol is": rescored(protocol="label"),
    "the protocol's version is": rescored(protocol_version="2"),
    "the first prompt's hash is": rescored(first_prompt_sha256="0" * 64),
    "the scoring engine is": rescored(engine="lm_eval"),
    "the metric is": rescored(metric="acc_norm"),
    "the lm-eval version is": rescored(lm_eval="0.4.12"),
    "the number of questions is": rescored(n=50),
    "the test subset is": rerowed(test_subset="full"),
    "the test rows' hash is": rerowed(test_sha256="0" * 64),
    "the backbone's hash is": lambda r: replace(r, backbone=replace(r.backbone, sha256="0" * 64)),
    "the number of prompt tokens is": retimed(prompt_tokens=50),
    "the number of new tokens is": retimed(new_tokens=50),
    "the dtype is": lambda r: replace(r, config={**r.config, "dtype": "float32"}),
}


@pytest.mark.parametrize("what", MIXTURES)
def test_a_mixture_in_one_table_is_an_error_that_names_both_files(what: str, folder: Path) -> None:
    path = fakes.write_run(folder, MIXTURES[what](fakes.run_record("lora", "openbookqa")))
    with pytest.raises(RecordError, match=what) as caught:
        load_suite(folder)
    named = [other.name for other in folder.glob("*.json") if str(other) in str(caught.value)]
    assert path.name in named
    assert len(named) == 2


@pytest.mark.parametrize("kept", ["scores", "times"])
def test_records_of_two_dtypes_are_refused_in_one_sentence_that_names_both(
    kept: str, folder: Path
) -> None:
    record = fakes.run_record("lora", "openbookqa")
    wide = replace(
        record,
        config={**record.config, "dtype": "float32"},
        backbone=replace(record.backbone, sha256="0" * 64),  # it holds the weights' bytes
        evaluations=record.evaluations if kept == "scores" else (),
        latency=record.latency if kept == "times" else (),
    )
    fakes.write_run(folder, wide)
    with pytest.raises(RecordError) as caught:
        load_suite(folder)
    first, second = folder / "base--arc_easy--seed0.json", folder / "lora--openbookqa--seed0.json"
    assert str(caught.value) == (
        f"{first} and {second} cannot share a table: the dtype is 'bfloat16' in the first and "
        "'float32' in the second; keep them in two suites or run one again like the other."
    )


def test_a_run_without_numbers_may_have_another_dtype(folder: Path) -> None:
    record = fakes.run_record("lora", "openbookqa")
    config = {**record.config, "dtype": "float32"}
    failed = replace(record, status="failed", config=config, evaluations=(), latency=())
    fakes.write_run(folder, failed)
    assert load_suite(folder).dtype == "bfloat16"


@pytest.mark.parametrize(("key", "setting"), [("learning_rate", 1e-3), ("adapter", {"rank": 8})])
def test_two_seeds_of_one_row_with_other_settings_are_an_error(
    key: str, setting: object, seeded: Path
) -> None:
    record = fakes.run_record("lora", "openbookqa", 2)
    fakes.write_run(seeded, replace(record, config={**record.config, key: setting}))
    with pytest.raises(RecordError, match=f"the setting {key} is .* in the first and"):
        load_suite(seeded)


def test_methods_and_tasks_may_have_settings_of_their_own(folder: Path) -> None:
    record = fakes.run_record("lora", "openbookqa")
    fakes.write_run(folder, replace(record, config={**record.config, "learning_rate": 1e-3}))
    assert load_suite(folder).rows == ["base", "lora", "furina"]


def test_the_papers_rows_come_in_its_order_and_before_others(folder: Path) -> None:
    suite = replace(load_suite(folder), papers_rows=("furina", "not run", "base"))
    assert suite.rows == ["base", "furina", "lora"]


def test_rows_of_one_method_are_rows_of_their_own(folder: Path) -> None:
    for row in ("furina-no-shared", "furina-one"):
        record = fakes.run_record("furina", "arc_easy")
        config = {**record.config, "row": row, "learning_rate": len(row) / 1e4}
        fakes.write_run(folder, replace(record, config=config))
    suite = load_suite(folder)
    assert suite.rows == ["base", "lora", "furina", "furina-no-shared", "furina-one"]
    (run,) = suite.select("furina-one", "arc_easy")
    assert run.path.name == "furina-one--arc_easy--seed0.json"
    assert len(suite.select("furina")) == len(fakes.TASKS)


def test_two_seeds_of_one_row_may_not_differ_whatever_their_method(folder: Path) -> None:
    for seed, method in enumerate(("furina", "lora")):
        record = fakes.run_record(method, "arc_easy", seed)
        config = {**record.config, "row": "one", "learning_rate": 1e-3 * (seed + 1)}
        fakes.write_run(folder, replace(record, config=config))
    with pytest.raises(RecordError, match="the setting learning_rate"):
        load_suite(folder)


@pytest.mark.parametrize(("method", "row"), [("base", "untouched"), ("furina", "base")])
def test_only_the_untouched_backbone_is_row_base(method: str, row: str, folder: Path) -> None:
    record = fakes.run_record(method, "arc_easy", samples=False)
    replace(record, config={**record.config, "row": row}).write(folder / "other.json")
    with pytest.raises(RecordError, match=rf"other\.json is row '{row}' of method '{method}'"):
        load_suite(folder)


def test_a_run_that_failed_before_anything_was_read_keeps_its_tasks(folder: Path) -> None:
    record = fakes.run_record("lora", "openbookqa")
    failed = replace(
        record,
        status="failed",
        error="killed",
        data=(),
        evaluations=(),
        backbone=replace(record.backbone, sha256=""),
    )
    scores = {"score": ["arc_easy", "openbookqa:label"], "protocol": "text"}
    mixture = {"mixture": {"arc_easy": {}, "openbookqa": {"cap": 5}}}
    for config, tasks in (({}, {"openbookqa"}), (scores, {"arc_easy"}), (mixture, {*fakes.TASKS})):
        fakes.write_run(folder, replace(failed, config={**record.config, **config}))
        suite = load_suite(folder)
        (run,) = suite.failures
        assert run.tasks("text") == tasks
        assert accuracy.absence(suite, "lora", "openbookqa", "x") == (
            notes.NO_RESULT if "openbookqa" in tasks else notes.NO_RECORD
        )


def test_two_files_of_one_cell_and_seed_are_an_error_that_names_both(folder: Path) -> None:
    fakes.run_record("lora", "arc_easy").write(folder / "copy.json")
    with pytest.raises(RecordError, match=r"copy\.json and .*lora--arc_easy--seed0\.json"):
        load_suite(folder)


def test_a_folder_without_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no run records"):
        load_suite(tmp_path)


def test_a_second_metric_is_shown_only_when_asked_for(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        record = RunRecord.read(path)
        second = tuple(replace(score, metric="acc_norm") for score in record.evaluations)
        replace(record, evaluations=record.evaluations + second).write(path)
    assert load_suite(folder).metric == "acc"
    assert load_suite(folder, "acc_norm").metric == "acc_norm"


def test_only_successful_runs_are_selected_and_the_others_listed(folder: Path) -> None:
    record = replace(fakes.run_record("lora", "openbookqa"), status="failed", error="killed")
    fakes.write_run(folder, record)
    suite = load_suite(folder)
    assert [run.record.task for run in suite.select("lora")] == ["arc_easy"]
    assert [run.record.error for run in suite.failures] == ["killed"]


def test_tasks_are_those_that_were_scored_and_have_a_mean(folder: Path) -> None:
    """A mixture's record bears the mixture's name, its scores their tasks'."""
    for path in sorted(folder.glob("*.json")):
        path.unlink()
    for method in ("base", "lora"):
        parts = [fakes.run_record(method, task, samples=False) for task in fakes.TASKS]
        fakes.write_run(
            folder,
            replace(
                parts[0],
                task="both",
                data=tuple(data for part in parts for data in part.data),
                evaluations=tuple(score for part in parts for score in part.evaluations),
            ),
        )
    suite = load_suite(folder)
    assert (suite.tasks, suite.trained) == (sorted(fakes.TASKS), ["both"])
    values = [
        100 * score.value
        for score in suite.select("lora")[0].record.evaluations
        if score.variant == "unmerged"
    ]
    assert numbers.macro(suite, "lora", "unmerged") == pytest.approx(sum(values) / 2)


def test_two_runs_that_score_the_same_are_an_error(folder: Path) -> None:
    record = fakes.run_record("lora", "arc_easy", samples=False)
    fakes.write_run(folder, replace(record, task="other"))
    with pytest.raises(RecordError, match="both score lora, seed 0, on arc_easy under text"):
        load_suite(folder)


def test_per_question_outputs_are_read_by_metric(folder: Path) -> None:
    run = load_suite(folder).select("lora", "arc_easy")[0]
    score = run.score("unmerged", "arc_easy", "text", "acc")
    assert score
    found = read_correct(run, score)
    assert found
    assert sum(found.values()) / len(found) == pytest.approx(score.value)


def test_a_record_without_its_per_question_outputs_gives_none(folder: Path) -> None:
    run = load_suite(folder).select("lora", "arc_easy")[0]
    score = run.score("unmerged", "arc_easy", "text", "acc")
    assert score
    assert score.samples
    assert read_correct(run, replace(score, samples=None)) is None
    (folder / score.samples).unlink()
    assert read_correct(run, score) is None


@pytest.mark.parametrize("damage", [b"text", b"\x1f\x8b\x08\x00"])
def test_damaged_per_question_outputs_are_one_sentence(damage: bytes, folder: Path) -> None:
    run = load_suite(folder).select("lora", "arc_easy")[0]
    score = run.score("unmerged", "arc_easy", "text", "acc")
    assert score
    assert score.samples
    (folder / score.samples).write_bytes(damage)
    with pytest.raises(RecordError, match="not a file of per-question outputs"):
        read_correct(run, score)


@pytest.mark.parametrize("kept", [0, 1, 599])
def test_per_question_outputs_of_another_score_are_an_error(kept: int, folder: Path) -> None:
    run = load_suite(folder).select("lora", "arc_easy")[0]
    score = run.score("unmerged", "arc_easy", "text", "acc")
    assert score
    assert score.samples
    answers = fakes.correct("lora", "arc_easy", 0)
    fakes.write_samples(folder / score.samples, "acc", answers[:kept])
    with pytest.raises(RecordError, match="does not give the score"):
        read_correct(run, score)
