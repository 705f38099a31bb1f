from __future__ import annotations

import statistics

import pytest
from scipy import stats  # type: ignore[import-untyped]

from furina.reporting.read import statistics as differences


def test_the_paired_z_is_scipys_paired_t() -> None:
    ours = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0, "e": 0.0}
    theirs = {"a": 0.0, "b": 0.0, "c": 1.0, "d": 0.0, "e": 1.0}
    found = differences.paired(ours, theirs)
    t = stats.ttest_rel(list(ours.values()), list(theirs.values())).statistic
    assert found.z == pytest.approx(t)
    assert found.paired


def test_the_unpaired_z_is_scipys_welch_t() -> None:
    ours, theirs = [0.41, 0.43, 0.40], [0.35, 0.36, 0.39, 0.33]
    found = differences.unpaired(ours, theirs)
    assert found.z == pytest.approx(stats.ttest_ind(ours, theirs, equal_var=False).statistic)
    assert not found.paired


def test_pairing_follows_the_keys_and_not_the_order() -> None:
    ours = {"a": 1.0, "b": 0.0, "c": 1.0}
    assert differences.paired(ours, dict(reversed(ours.items()))).value == 0.0


def test_equal_answers_differ_by_no_standard_errors() -> None:
    ours = {"a": 1.0, "b": 0.0}
    assert differences.paired(ours, ours).z == 0.0


def test_nothing_is_said_about_the_error_of_one_value() -> None:
    found = differences.unpaired([0.4], [0.3, 0.2])
    assert found.value == pytest.approx(0.15)
    assert (found.stderr, found.z) == (None, None)
    assert differences.stdev([1.0]) is None


def test_standard_errors_of_scores_combine_in_quadrature() -> None:
    found = differences.of_scores(0.6, 0.03, 0.5, 0.04)
    assert found.z == pytest.approx(2.0)


def test_a_standard_error_is_the_deviation_over_root_n() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    assert differences.standard_error(values) == pytest.approx(statistics.stdev(values) / 2)
