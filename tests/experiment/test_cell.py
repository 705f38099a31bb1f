"""A cell's record holds what was measured, and a part that is finished is not measured again."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from furina.backbones.load import backbone_hash, load_backbone
from furina.data.items import data_hash
from furina.evaluation.evaluate import evaluate
from furina.evaluation.evaluation import Evaluation
from furina.evaluation.samples import Sample, read_samples
from furina.experiment import cell
from furina.experiment.cell import run_cell
from furina.experiment.config import RunConfig
from furina.progress import shown
from furina.records import RunRecord
from furina.records.cells import publish, suite_records
from tests.experiment.conftest import Finished
from tests.experiment.helpers import SIZES, time_few_tokens, tiny

COMMAND = "furina run somewhere"


class Done(NamedTuple):
    config: RunConfig
    folder: Path

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def record(self) -> RunRecord:
        return RunRecord.read(self.folder / "record.json")

    def samples(self, variant: str) -> list[Sample]:
        score = next(s for s in self.record.evaluations if s.variant == variant)
        assert score.samples is not None
        return read_samples(self.run_dir / score.samples)

    def again(self) -> RunRecord:
        record = run_cell(self.config, self.run_dir, COMMAND)
        record.write(self.folder / "record.json")
        return record


@pytest.fixture(autouse=True, scope="module")
def few_tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        time_few_tokens(patch)
        yield


@pytest.fixture(scope="module")
def first(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The cell of the run that is fitted already."""
    folder = tmp_path_factory.mktemp("cell")
    shutil.copytree(finished.run_dir, folder / "run")
    done = Done(finished.config, folder)
    done.again()
    return done


@pytest.fixture
def copy(first: Done, tmp_path: Path) -> Done:
    shutil.copytree(first.folder, tmp_path / "copy")
    return Done(first.config, tmp_path / "copy")


def fail(*arguments: Any, **options: Any) -> None:
    raise AssertionError("measured again")


def measured(record: RunRecord) -> RunRecord:
    return replace(record, started="", finished="")


def test_the_record_says_what_was_run(first: Done, finished: Finished) -> None:
    record, config = first.record, first.config
    assert (record.status, record.error, record.command) == ("success", None, COMMAND)
    assert (record.method, record.task, record.seed) == ("furina", "arc_easy", 0)
    assert RunConfig().updated(record.config) == config
    assert record.backbone.sha256 == backbone_hash(load_backbone("tiny-llama", "float32"))
    assert record.training == finished.fitted.training
    data, (rows,) = finished.fitted.data, record.data
    assert (rows.task, rows.source) == ("arc_easy", "folder")
    assert rows.train_sha256 == data_hash(data.train_items["arc_easy"])
    assert rows.validation_sha256 == data_hash(data.validation_items["arc_easy"])


@pytest.mark.parametrize("variant", ["unmerged", "merged"])
def test_the_samples_reproduce_the_scores(first: Done, variant: str) -> None:
    scores = [score for score in first.record.evaluations if score.variant == variant]
    samples = first.samples(variant)
    assert {score.metric for score in scores} == {"acc", "acc_norm"}
    for score in scores:
        right = [sample.correct[score.metric] for sample in samples]
        assert score.n == len(right) == first.config.test_size
        assert score.value == pytest.approx(sum(right) / len(right))


def test_merged_and_unmerged_are_two_scorings_of_the_same_questions(first: Done) -> None:
    unmerged, merged = first.samples("unmerged"), first.samples("merged")
    assert [sample.id for sample in unmerged] == [sample.id for sample in merged]
    likelihoods = [[s.loglikelihoods for s in samples] for samples in (unmerged, merged)]
    assert likelihoods[0] != likelihoods[1]  # rounding differs: the second is not a copy
    for one, other in zip(*likelihoods, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_the_merge_is_measured(first: Done) -> None:
    merge = first.record.merge
    assert merge is not None and merge.num_merged == 14  # seven linears in each of two layers
    assert merge.max_abs_delta > 0 and merge.relative_delta > 0
    assert merge.logits_max_difference is not None and merge.logits_rms_difference is not None
    assert 0 < merge.logits_rms_difference <= merge.logits_max_difference < 1e-3
    pairs = zip(first.samples("unmerged"), first.samples("merged"), strict=True)
    changed = sum(a.prediction["acc"] != b.prediction["acc"] for a, b in pairs)
    assert merge.answers_changed == changed


def test_three_variants_are_timed(first: Done) -> None:
    latency = first.record.latency
    assert sorted(result.variant for result in latency) == ["base", "merged", "unmerged"]
    assert {result.total_ms.n for result in latency} == {first.config.latency_rounds}
    assert all(result.total_ms.median > 0 for result in latency)


def test_a_finished_cell_measures_nothing_again(
    copy: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy.record
    monkeypatch.setattr(cell, "evaluate", fail)
    monkeypatch.setattr(cell, "measure_latency", fail)
    assert measured(copy.again()) == measured(before)
    assert copy.samples("merged")


def test_a_cell_killed_before_the_merged_scoring_repeats_only_that(
    copy: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls = copy.record, []

    def counted(*arguments: Any, **options: Any) -> Evaluation:
        calls.append(1)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(cell, "evaluate", counted)
    (copy.folder / "run" / "scores-arc_easy-text-merged.json").unlink()
    assert measured(copy.again()) == measured(before)
    assert len(calls) == 1


def test_a_cell_is_published_under_the_names_of_any_suite_that_has_it(copy: Done) -> None:
    record, results = run_cell(copy.config, copy.run_dir, COMMAND), copy.folder / "results"
    file = publish(record, results, "other", "best", "furina run other", copy.run_dir)
    ((found, published),) = suite_records(results / "other")
    assert found == file and RunRecord.read(file) == record
    assert (published.suite, published.row, published.method) == ("other", "best", "furina")
    assert published.command == "furina run other"
    assert published.evaluations == record.evaluations
    for score in published.evaluations:
        assert score.samples == f"samples-arc_easy-text--{score.variant}.jsonl.gz"
        assert len(read_samples(file.parent / score.samples)) == score.n


def test_changed_answers_are_counted(copy: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    def first_three_turned(*arguments: Any, **options: Any) -> Evaluation:
        found = evaluate(*arguments, **options)
        turned = [
            replace(sample, prediction={m: p + 1 for m, p in sample.prediction.items()})
            for sample in found.samples[:3]
        ]
        return replace(found, samples=(*turned, *found.samples[3:]))

    (copy.folder / "run" / "scores-arc_easy-text-merged.json").unlink()
    monkeypatch.setattr(cell, "evaluate", first_three_turned)
    merge = copy.again().merge
    pairs = zip(copy.samples("unmerged"), copy.samples("merged"), strict=True)
    different = [a.prediction["acc"] != b.prediction["acc"] for a, b in pairs]
    assert all(different[:3])
    assert merge is not None and merge.answers_changed == sum(different)


def test_the_base_is_scored_and_timed_once_and_trains_nothing(
    data_dir: str, tmp_path: Path
) -> None:
    config = tiny(data_dir, "base", test_size=None, seed=3)
    record = Done(config, tmp_path).again()
    assert (record.training, record.merge) == (None, None)
    assert {score.variant for score in record.evaluations} == {"base"}
    assert {score.n for score in record.evaluations} == {SIZES["test"]}
    assert [result.variant for result in record.latency] == ["base"]
    assert (record.data[0].test_subset, record.data[0].train_sha256) == ("full", None)


def test_a_mixture_is_scored_once_more_without_its_router(
    data_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So large a rate that the router's gates, and with them the answers, are far from even.
    config = tiny(data_dir, "molora", score_without_router=True, test_size=None, learning_rate=0.3)
    done = Done(config, tmp_path)
    record = done.again()
    scores = {score.variant: score for score in record.evaluations}
    assert list(scores) == ["unmerged", "router_removed"]
    assert [result.variant for result in record.latency] == ["base", "unmerged"]
    assert scores["unmerged"].first_prompt_sha256 == scores["router_removed"].first_prompt_sha256
    routed, removed = ([s.loglikelihoods for s in done.samples(variant)] for variant in scores)
    assert routed != removed
    monkeypatch.setattr(cell, "evaluate", fail)
    assert measured(done.again()) == measured(record)


def test_a_diverged_run_leaves_a_record_that_says_so(data_dir: str, tmp_path: Path) -> None:
    config = tiny(data_dir, "lora", learning_rate=1e30, warmup_steps=0)
    done = Done(config, tmp_path)
    record = done.again()
    assert record.status == "diverged" and str(record.error).startswith("Training diverged")
    assert (record.training, record.evaluations, record.latency) == (None, (), ())


def test_a_mixture_is_trained_at_once_and_each_task_scored_as_asked(
    data_dir: str, tmp_path: Path
) -> None:
    mixture = {"arc_easy": {"cap": 9, "task_type": 0}, "openbookqa": {"task_type": 1}}
    asked = ("arc_easy", "openbookqa:label")
    config = tiny(data_dir, "lora", task="both", mixture=mixture, score=asked, test_size=None)
    record = Done(config, tmp_path).again()
    assert record.task == "both"
    assert [data.task for data in record.data] == ["arc_easy", "openbookqa"]
    assert all(data.train_sha256 and data.test_sha256 for data in record.data)
    found = {(s.task, s.protocol, s.variant) for s in record.evaluations}
    assert found == {
        (task, protocol, variant)
        for task, protocol in (("arc_easy", "text"), ("openbookqa", "label"))
        for variant in ("unmerged", "merged")
    }
    assert len({score.samples for score in record.evaluations}) == 4
    assert record.merge is not None and record.merge.answers_changed is not None


def test_a_generated_score_names_its_engine(data_dir: str, tmp_path: Path) -> None:
    config = tiny(data_dir, "base", protocol="generate_clean", test_size=3)
    (score,) = Done(config, tmp_path).again().evaluations
    assert (score.engine, score.protocol, score.metric) == ("generate", "generate_clean", "acc")


def test_each_part_of_a_cell_says_how_far_it_is(copy: Done) -> None:
    """The clock is so fast that every part and every count of it is worth a line."""
    stream, seconds = io.StringIO(), itertools.count(0, 20)
    shutil.rmtree(copy.run_dir)
    cell._backbone.cache_clear()
    with shown(stream, lambda: float(next(seconds))):
        copy.again()
    lines = [line.strip().partition(": ") for line in stream.getvalue().splitlines()]
    assert list(dict.fromkeys(name for name, _, _ in lines)) == [
        "loading the test items",
        "loading and hashing the backbone",
        "loading the backbone and the data",
        "training",
        "measuring selection and gradients",
        "scoring unmerged on arc_easy",
        "merging",
        "scoring merged on arc_easy",
        "timing",
    ]
    steps = copy.config.steps
    for part, count in (
        ("training", f"{steps}/{steps} steps"),
        ("training", "2/2 validation batches"),
        ("scoring merged on arc_easy", "0/24 answers"),
        ("timing", "2/3 generations"),
    ):
        assert any(name == part and text.startswith(count) for name, _, text in lines)
    assert sum(text.startswith("done in ") for _, _, text in lines) == 9
