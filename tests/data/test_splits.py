"""Splits and subsets are seeded, disjoint, and independent of the row order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furina.data import splits
from furina.data.items import Question, overlap
from furina.errors import ConfigurationError


def _question(number, stem):
    return Question(str(number), stem, ("a", "b"), 0)


def _ids(questions):
    return {question.id for question in questions}


@given(
    stems=st.lists(st.sampled_from("abcdefghijkl"), min_size=12, max_size=40),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 9),
)
def test_a_split_is_a_partition_without_a_question_on_both_sides(stems, share, seed):
    questions = [_question(number, stem) for number, stem in enumerate(stems)]
    try:
        train, held_out = splits.split_train(questions, int(share * len(stems)), seed)
    except ConfigurationError:  # groups of equal questions may not add up to the size
        return
    assert len(held_out) == int(share * len(stems))
    assert sorted(train + held_out, key=lambda q: int(q.id)) == questions
    assert overlap(train, held_out) == []


def test_repeated_questions_stay_together(many_questions):
    for seed in range(20):
        train, held_out = splits.split_train(many_questions, 30, seed)
        assert (len(train), len(held_out)) == (73, 30)
        assert overlap(train, held_out) == []


def test_the_split_depends_on_the_seed_and_not_on_the_order(many_questions):
    first = splits.split_train(many_questions, 30, seed=1)
    backwards = splits.split_train(many_questions[::-1], 30, seed=1)
    assert [_ids(part) for part in first] == [_ids(part) for part in backwards]
    assert _ids(splits.split_train(many_questions, 30, seed=2)[1]) != _ids(first[1])


def test_nothing_is_held_out_on_request(many_questions):
    assert splits.split_train(many_questions, 0, seed=0) == (many_questions, [])


@pytest.mark.parametrize("size", [103, 1000, -1])
def test_an_impossible_validation_size_is_refused(many_questions, size):
    with pytest.raises(ConfigurationError, match=f"validation_size={size} cannot be split off 103"):
        splits.split_train(many_questions, size, seed=0)


def test_a_subset_has_its_size_name_and_order(many_questions):
    name, chosen = splits.test_subset(many_questions, 40, seed=7, name="test")
    assert name == "test-40-seed7"
    assert len(chosen) == 40
    assert chosen == [question for question in many_questions if question in chosen]


def test_a_subset_depends_on_the_seed_and_not_on_the_order(many_questions):
    chosen = _ids(splits.test_subset(many_questions, 40, seed=7)[1])
    assert _ids(splits.test_subset(many_questions[::-1], 40, seed=7)[1]) == chosen
    assert _ids(splits.test_subset(many_questions, 40, seed=8)[1]) != chosen


def test_a_smaller_subset_lies_inside_a_larger_one(many_questions):
    sizes = [_ids(splits.test_subset(many_questions, size, seed=7)[1]) for size in (10, 50)]
    assert sizes[0] < sizes[1]


def test_no_size_means_all(many_questions):
    assert splits.test_subset(many_questions, None, seed=7) == ("full", many_questions)


@pytest.mark.parametrize("size", [0, 104])
def test_an_impossible_subset_is_refused(many_questions, size):
    with pytest.raises(ConfigurationError, match=f"test_size={size} is not possible with 103"):
        splits.test_subset(many_questions, size, seed=0)


def test_shared_questions_are_warned_about_and_kept(many_questions):
    test = many_questions[1:3]  # each of the two also stands in train a second time
    with pytest.warns(UserWarning, match="4 of 103 train items of arc_easy .* kept"):
        splits.warn_overlap(many_questions, test, "arc_easy")


def test_disjoint_questions_give_no_warning(many_questions, recwarn):
    splits.warn_overlap(many_questions[10:20], many_questions[20:30], "arc_easy")
    assert not recwarn
