from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from furina.records import RecordError
from furina.reporting.compare.rows import comparisons, signed_rank
from furina.reporting.read import statistics as significance
from furina.reporting.read.statistics import Comparison, bootstrap, holm, wilcoxon
from tests.records import fakes
from tests.reporting.frames import load_suite

N = 400


def coins(rate: float, seed: str, n: int = N) -> list[bool]:
    """Return answers of which exactly `rate` are right, in an order of their own."""
    answers = [i < round(rate * n) for i in range(n)]
    random.Random(seed).shuffle(answers)
    return answers


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def only(folder: Path, reference: str = "lora") -> Comparison:
    (found,) = comparisons(load_suite(folder), reference).values()
    return found


def test_the_interval_is_scipys_stratified_percentile_bootstrap() -> None:
    draw = generator(7)
    first = draw.choice([-1.0, 0.0, 1.0], size=300, p=[0.2, 0.5, 0.3]) / 2
    second = draw.choice([-1.0, 0.0, 1.0], size=80, p=[0.1, 0.7, 0.2]) / 2
    theirs = stats.bootstrap(
        (first, second),
        lambda a, b, axis: a.mean(axis=axis) + b.mean(axis=axis),
        n_resamples=20_000,
        method="percentile",
        rng=generator(8),
    )
    ours = bootstrap([first, second], generator())
    error = 0.1 * theirs.standard_error
    assert ours.low / 100 == pytest.approx(theirs.confidence_interval.low, abs=error)
    assert ours.high / 100 == pytest.approx(theirs.confidence_interval.high, abs=error)
    assert ours.difference == pytest.approx(100 * (first.mean() + second.mean()))


def test_p_and_interval_are_those_of_all_resamples_counted_out() -> None:
    first, second = [-0.2, 0.1, 0.3, 0.5], [-0.1, 0.05, 0.2]
    sums = [
        statistics.fmean(a) + statistics.fmean(b)
        for a in itertools.product(first, repeat=4)
        for b in itertools.product(second, repeat=3)
    ]
    found = bootstrap([np.array(first), np.array(second)], generator())
    beyond = sum(total <= 1e-12 for total in sums) / len(sums)
    assert found.p == pytest.approx(2 * beyond, abs=0.02)
    low, high = np.percentile(sums, [2.5, 97.5])
    assert found.low == pytest.approx(100 * low, abs=1.5)
    assert found.high == pytest.approx(100 * high, abs=1.5)


def test_a_part_that_scores_in_fractions_is_resampled_like_any_other() -> None:
    values = generator(3).normal(0.1, 1.0, size=500)
    found = bootstrap([values], generator())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (found.high - found.low) / 200 == pytest.approx(half, rel=0.05)


@pytest.mark.parametrize("seeds", [1, 3])
def test_identical_rows_have_p_1_and_no_width(seeds: int, tmp_path: Path) -> None:
    for seed, rate in zip(range(seeds), (0.5, 0.6, 0.7), strict=False):
        for row in ("lora", "twin"):
            fakes.write_row(tmp_path, row, "arc_easy", coins(rate, f"{seed}"), seed)
    assert only(tmp_path) == Comparison(0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("reference, sign", [("lora", 1), ("better", -1)])
def test_a_constant_shift_is_found_with_its_size_and_sign(
    reference: str, sign: int, tmp_path: Path
) -> None:
    for seed in range(3):
        for task in ("arc_easy", "openbookqa"):
            answers = coins(0.5, f"{task} {seed}")
            wrong = [i for i, answer in enumerate(answers) if not answer][:40]
            better = [answer or i in wrong for i, answer in enumerate(answers)]
            fakes.write_row(tmp_path, "lora", task, answers, seed)
            fakes.write_row(tmp_path, "better", task, better, seed)
    found = only(tmp_path, reference)
    assert found.difference == pytest.approx(sign * 10.0)
    assert found.low < sign * 10.0 < found.high
    assert sign * found.low > 0 and sign * found.high > 0
    assert found.p == pytest.approx(2 / (significance.RESAMPLES + 1))


def test_a_task_counts_by_its_mean_and_not_by_its_questions(tmp_path: Path) -> None:
    for task, n, rate in (("arc_easy", 400, 0.6), ("openbookqa", 40, 0.5)):
        fakes.write_row(tmp_path, "lora", task, coins(0.5, "lora", n))
        fakes.write_row(tmp_path, "other", task, coins(rate, "other", n))
    assert only(tmp_path).difference == pytest.approx(5.0)


def widths(folder: Path, rates: dict[str, list[float]], mixture: bool = False) -> float:
    """Return the width of the interval where each seed of a row is right at its own rate.

    Every run answers the first questions right, so only the runs differ within a row.
    """
    for row, seeds in rates.items():
        for seed, rate in enumerate(seeds):
            answers = [i < round(rate * N) for i in range(N)]
            if mixture:
                tasks = [
                    fakes.write_row(folder, row, task, answers, seed)
                    for task in ("arc_easy", "openbookqa")
                ]
                for record in tasks:
                    (folder / record.file_name).unlink()
                whole = replace(
                    tasks[0],
                    task="both",
                    data=tuple(data for record in tasks for data in record.data),
                    evaluations=tuple(s for record in tasks for s in record.evaluations),
                )
                whole.write(folder / whole.file_name)
            else:
                for task in ("arc_easy", "openbookqa"):
                    fakes.write_row(folder, row, task, answers, seed)
    found = only(folder, "base")
    return found.high - found.low


def expected_width(rates: list[float], runs: int) -> float:
    """Return the width of an interval from the variances of questions and of runs.

    Few runs tell their variance badly, so theirs counts by Student's distribution.
    """
    means = [statistics.fmean(i < rate * N for rate in rates) - (i < 0.4 * N) for i in range(N)]
    questions = statistics.pvariance(means) / N / 2  # the mean of two tasks halves it
    seeds = statistics.variance(rates) / len(rates) / runs
    wide = stats.t.ppf(0.975, runs * (len(rates) - 1)) / stats.norm.ppf(0.975)
    return 2 * 1.96 * 100 * math.sqrt(questions + seeds * wide**2)


RATES = [0.5, 0.55, 0.62, 0.7, 0.78, 0.8]


def test_the_interval_holds_the_variance_of_questions_and_of_each_tasks_runs(
    tmp_path: Path,
) -> None:
    width = widths(tmp_path, {"base": [0.4], "other": RATES})
    assert width == pytest.approx(expected_width(RATES, runs=2), rel=0.05)


def test_the_runs_of_a_mixture_err_on_all_its_tasks_together(tmp_path: Path) -> None:
    width = widths(tmp_path, {"base": [0.4], "other": RATES}, mixture=True)
    assert width == pytest.approx(expected_width(RATES, runs=1), rel=0.05)


def test_two_seeds_count_with_their_whole_variance_and_as_few() -> None:
    (part,) = significance.run_parts([[0.5], [0.4, 0.6]])  # a single run has no deviation
    resamples = [statistics.fmean(pair) for pair in itertools.product(part, repeat=2)]
    wide = stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975)
    whole = statistics.variance([0.4, 0.6]) / 2
    assert statistics.pvariance(resamples) == pytest.approx(whole * wide**2)


def test_other_seeds_are_not_paired(tmp_path: Path) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    for seed, rate in enumerate((0.4, 0.5, 0.6)):
        answers = coins(rate, "one order")
        for folder, shift in ((same, 0), (other, 1)):
            fakes.write_row(folder, "lora", "arc_easy", answers, seed)
            fakes.write_row(folder, "twin", "arc_easy", answers, seed + shift)
    assert only(same).high == 0.0
    # Each row's deviation over three seeds is 10 points, which leaves 2 + 2 degrees of freedom.
    seeds_alone = stats.t.ppf(0.975, 4) * 10 * math.sqrt(2 / 3)
    assert only(other).high == pytest.approx(seeds_alone, rel=0.1)


def test_a_comparison_depends_on_nothing_but_its_two_rows(tmp_path: Path) -> None:
    for row, rate in (("lora", 0.5), ("other", 0.55)):
        fakes.write_row(tmp_path, row, "arc_easy", coins(rate, row))
    first = comparisons(load_suite(tmp_path), "lora")["other"]
    fakes.write_row(tmp_path, "a-third", "arc_easy", coins(0.6, "a-third"))
    np.random.seed(1)
    random.seed(1)
    assert comparisons(load_suite(tmp_path), "lora")["other"] == first
    assert 0 < first.p < 1


def test_two_rows_of_the_same_answers_have_draws_of_their_own(tmp_path: Path) -> None:
    fakes.write_row(tmp_path, "lora", "arc_easy", coins(0.5, "lora"))
    for row in ("one", "two"):
        fakes.write_row(tmp_path, row, "arc_easy", coins(0.55, "same"))
    found = comparisons(load_suite(tmp_path), "lora")
    assert found["one"].difference == found["two"].difference
    assert found["one"] != found["two"]


def test_a_row_without_per_question_outputs_is_left_out(tmp_path: Path) -> None:
    for row in ("lora", "one", "two"):
        record = fakes.write_row(tmp_path, row, "arc_easy", coins(0.5, row))
        if row == "one":
            (tmp_path / str(record.evaluations[1].samples)).unlink()
    assert set(comparisons(load_suite(tmp_path), "lora")) == {"two"}
    assert comparisons(load_suite(tmp_path), "one") == {}


def test_other_questions_cannot_be_compared(tmp_path: Path) -> None:
    fakes.write_row(tmp_path, "lora", "arc_easy", coins(0.5, "lora"))
    record = fakes.write_row(tmp_path, "other", "arc_easy", coins(0.5, "other"))
    samples = tmp_path / str(record.evaluations[1].samples)
    fakes.write_samples(samples, "acc", coins(0.5, "other"), first_id=1)
    with pytest.raises(RecordError, match=r"other--.* and .*lora--.*cannot be paired"):
        comparisons(load_suite(tmp_path), "lora")


def test_the_merged_model_stands_for_a_row(tmp_path: Path) -> None:
    fakes.write_row(tmp_path, "lora", "arc_easy", coins(0.5, "x"))
    record = fakes.write_row(tmp_path, "other", "arc_easy", coins(0.5, "x"))
    better = fakes.score("merged", "arc_easy", coins(0.75, "x"), "samples/better.jsonl.gz")
    fakes.write_samples(tmp_path / "samples/better.jsonl.gz", "acc", coins(0.75, "x"))
    replace(record, evaluations=(record.evaluations[0], better)).write(tmp_path / record.file_name)
    assert only(tmp_path).difference == pytest.approx(25.0)


def signed_rank_by_hand(values: list[float]) -> float:
    """Return p from the rank sums of all choices of signs."""
    ranks = stats.rankdata(np.abs(values))
    observed = sum(rank for rank, value in zip(ranks, values, strict=True) if value > 0)
    middle = sum(ranks) / 2
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(values))
    ]
    far = abs(observed - middle) - 1e-9
    return sum(abs(total - middle) >= far for total in sums) / len(sums)


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 1.5, -0.2, 2.5, 3.1, 0.9],
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
        [1.0, -1.0, 2.0, -2.0, 3.0, 3.0, 4.0],
    ],
)
def test_wilcoxons_p_is_that_of_all_signs(values: list[float]) -> None:
    assert wilcoxon(values) == pytest.approx(signed_rank_by_hand(values))


def test_wilcoxons_test_needs_six_pairs_and_a_difference() -> None:
    assert wilcoxon([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert wilcoxon([0.0] * 6) == 1.0
    assert 2 * 0.5**significance.FEWEST_PAIRS < 0.05 <= 2 * 0.5 ** (significance.FEWEST_PAIRS - 1)


def test_the_base_model_stands_opposite_every_seed_and_others_opposite_their_own(
    tmp_path: Path,
) -> None:
    for task in ("arc_easy", "openbookqa"):
        fakes.write_row(tmp_path, "base", task, coins(0.3, "base"))
        for seed in range(3):
            fakes.write_row(tmp_path, "lora", task, coins(0.5 + 0.01 * seed, "lora"), seed)
        for seed in range(1, 4):
            fakes.write_row(tmp_path, "other", task, coins(0.6, "other"), seed)
    suite = load_suite(tmp_path)
    assert signed_rank(suite, "lora", "base") == (pytest.approx(2 * 0.5**6), 6)
    assert signed_rank(suite, "base", "lora") == (pytest.approx(2 * 0.5**6), 6)
    assert signed_rank(suite, "other", "lora") == (None, 4)


def test_holms_correction_of_a_worked_example() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    corrected = {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    assert holm(p) == pytest.approx(corrected)
    assert list(holm(p)) == list(p)
    assert holm({}) == {}
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}


def test_holm_rejects_what_the_step_down_procedure_rejects() -> None:
    draw = random.Random(5)
    for _ in range(50):
        p = {str(i): draw.random() ** 3 for i in range(6)}
        for level in (0.01, 0.05, 0.3):
            rejected = set()
            for i, name in enumerate(sorted(p, key=p.__getitem__)):
                if p[name] > level / (6 - i):
                    break
                rejected.add(name)
            assert {name for name, value in holm(p).items() if value <= level} == rejected
