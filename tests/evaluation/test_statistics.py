from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from furina.errors import ConfigurationError, DataError
from furina.evaluation.samples import Sample
from furina.evaluation.statistics import is_suspect, paired_gain, standard_error


def samples(right: list[bool], prefix: str = "q") -> list[Sample]:
    return [
        Sample(f"{prefix}{number}", "", 0, (-1.0, -2.0), (1, 1), {"acc": 0}, {"acc": value})
        for number, value in enumerate(right)
    ]


answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=50)


@given(answers)
def test_the_paired_error_is_that_of_the_mean_of_the_differences(pairs):
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    gain = paired_gain(samples([bool(x) for x in a]), samples([bool(x) for x in b]))
    assert gain.difference == pytest.approx((a - b).mean())
    assert gain.stderr == pytest.approx((a - b).std(ddof=1) / math.sqrt(len(pairs)), abs=1e-12)
    assert (gain.gained, gain.lost) == (((a - b) > 0).sum(), ((a - b) < 0).sum())


@given(answers)
def test_swapping_the_models_turns_the_sign(pairs):
    a, b = (samples(list(column)) for column in zip(*pairs, strict=True))
    forth, back = paired_gain(a, b), paired_gain(b, a)
    assert (forth.difference, forth.z) == (-back.difference, -back.z)
    assert forth.stderr == back.stderr


def test_models_that_answer_alike_have_no_gain_at_all():
    right = [True, False, True, True]
    assert paired_gain(samples(right), samples(right))[:3] == (0.0, 0.0, 0.0)


def test_pairing_sees_a_gain_that_separate_errors_would_hide():
    b = [number % 2 == 0 for number in range(100)]
    a = [value or number < 20 for number, value in enumerate(b)]
    gain = paired_gain(samples(a), samples(b))
    unpaired = math.hypot(standard_error(a), standard_error(b))
    assert gain.z > 3 > gain.difference / unpaired


def test_a_gain_on_every_question_is_infinitely_many_errors():
    assert paired_gain(samples([True] * 3), samples([False] * 3)).z == math.inf
    assert paired_gain(samples([False] * 3), samples([True] * 3)).z == -math.inf


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(samples([True, False], prefix="other"), id="other-questions"),
        pytest.param(samples([True, False, True]), id="more-questions"),
        pytest.param([*samples([True]), *samples([True])], id="a-question-twice"),
        pytest.param([], id="none"),
    ],
)
def test_only_the_same_questions_can_be_paired(other):
    with pytest.raises(DataError):
        paired_gain(samples([True, False]), other)


def test_an_unknown_metric_is_named_with_the_nearest():
    with pytest.raises(ConfigurationError, match="Did you mean 'acc'"):
        paired_gain(samples([True, False]), samples([True, False]), metric="ac")


@given(st.lists(st.booleans(), min_size=2, max_size=50))
def test_the_standard_error_is_lm_evals(values):
    from lm_eval.api.metrics import mean_stderr

    assert standard_error(values) == pytest.approx(mean_stderr(values), abs=1e-12)


def test_one_question_has_no_standard_error():
    with pytest.raises(DataError, match="at least 2"):
        standard_error([1.0])


@pytest.mark.parametrize(
    ("value", "suspect"), [(0.10, True), (0.25, True), (0.29, True), (0.30, False)]
)
def test_a_score_is_suspect_unless_two_errors_above_chance(value, suspect):
    assert is_suspect(value, stderr=0.02, chance=0.25) is suspect


def test_statistics_and_samples_need_no_torch():
    code = (
        "import sys, furina.evaluation.statistics, furina.evaluation.samples;"
        "assert not {'torch', 'transformers', 'lm_eval', 'lightning'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
