"""benchmarks/scoring: each script holds ours against lm-eval, and its status says how it ended."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.scoring import equality, independence, speed
from furina.data.items import Question
from tests.benchmarks.helpers import printed
from tests.experiment.helpers import write_data

TINY = ["--backbone", "tiny-llama", "--rows", "5"]


@pytest.fixture(scope="module", autouse=True)
def questions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made-up questions in place of fetched ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FURINA_DATA_DIR", write_data(tmp_path_factory.mktemp("data")))
        yield


def test_both_are_timed_on_the_same_requests_and_say_the_same(capsys):
    words = ["--tasks", "arc_easy", "openbookqa", "--rounds", "2", "--tuning-rows", "2"]
    with pytest.raises(SystemExit) as stopped:
        speed.main([*TINY, *words, "--threads", "1"])
    report = printed(capsys)
    assert not stopped.value.code
    assert list(report["ratios"]) == ["arc_easy", "openbookqa", "geometric mean"]
    assert [len(own) for own in report["seconds"]["arc_easy"].values()] == [2, 2]
    assert max(report["max_difference"].values()) < 1e-4
    assert report["versions"].keys() == {"torch", "transformers", "lm_eval"}


def test_a_near_tie_that_changes_is_counted_but_not_as_wrong():
    items = [Question("a", "?", ("x", "y"), 0), Question("b", "?", ("x", "y"), 0)]
    theirs = [(value, False) for value in (-1.0, -1.0005, -1.0, -3.0)]
    ours = [(value, False) for value in (-1.0005, -1.0, -3.0, -1.0)]
    found = speed.compare(theirs, ours, items)
    assert found == {"max_difference": 2.0, "differing": 2, "differing_beyond_gap": 1}


def test_lm_evals_own_task_scores_alike(capsys):
    with pytest.raises(SystemExit) as stopped:
        equality.main([*TINY, "--tasks", "openbookqa"])
    found = printed(capsys)["tasks"]["openbookqa"]
    assert not stopped.value.code
    assert (found["rows"], found["differing"], found["apart"]) == (5, 0, [])
    assert found["scores"]["lm_eval"] == found["scores"]["shared"]


def test_a_score_does_not_depend_on_batch_size_or_engine(capsys):
    with pytest.raises(SystemExit) as stopped:
        independence.main(TINY)
    report = printed(capsys)
    assert not stopped.value.code
    assert list(report["float32"]) == ["lm_eval 8", "shared 1", "shared 8", "shared 32"]
    assert max(told["max_difference"] for told in report["float32"].values()) < 1e-4
    assert report["bfloat16_error"] > 1e-4
