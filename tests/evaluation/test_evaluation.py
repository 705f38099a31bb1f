from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furina.errors import DataError
from furina.evaluation.evaluation import is_suspect, standard_error


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


def test_scores_and_samples_need_no_torch():
    code = (
        "import sys, furina.evaluation.evaluation, furina.evaluation.samples;"
        "assert not {'torch', 'transformers', 'lm_eval', 'lightning'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
