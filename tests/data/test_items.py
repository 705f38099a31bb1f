"""Questions refuse nonsense, and their hash sees every field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from furina.data.items import (
    Instruction,
    Problem,
    Program,
    Question,
    chance_level,
    content_id,
    data_hash,
    normalised,
    overlap,
)
from furina.errors import DataError

QUESTION = Question("1", "Which one flies?", ("a stone", "a bird"), 1)


def test_letters_name_the_choices_in_order():
    assert replace(QUESTION, choices=("a", "b", "c", "d", "e")).letters == tuple("ABCDE")


@pytest.mark.parametrize(
    "change", [{"answer": 2}, {"answer": -1}, {"choices": ("only",), "answer": 0}]
)
def test_a_question_without_a_valid_answer_is_refused(change):
    with pytest.raises(DataError, match="Question '1' has"):
        replace(QUESTION, **change)


@pytest.mark.parametrize(
    "change", [{"id": "2"}, {"stem": "Which?"}, {"choices": ("a", "b")}, {"answer": 0}]
)
def test_the_hash_changes_with_every_field(change):
    assert data_hash([replace(QUESTION, **change)]) != data_hash([QUESTION])


def test_the_hash_depends_on_the_order():
    other = replace(QUESTION, id="2")
    assert data_hash([QUESTION, other]) != data_hash([other, QUESTION])


def test_the_hash_of_a_question_does_not_change_between_versions():
    expected = "a14bf461ed7ef6928d6c3405f3da8db150ef09812046d618f9a60913374b9a5c"
    assert data_hash([QUESTION]) == expected


def test_overlap_ignores_case_and_spacing_but_not_words():
    same = replace(QUESTION, id="2", stem="which  ONE flies? ")
    assert overlap([QUESTION], [same]) == [QUESTION]
    assert overlap([QUESTION], [replace(same, stem="Which one swims?")]) == []


def test_chance_is_the_mean_over_questions():
    assert chance_level([QUESTION, replace(QUESTION, choices=("a", "b", "c", "d"))]) == 0.375


def test_chance_is_the_commonest_answer_where_all_have_the_same_choices():
    same = [replace(QUESTION, id=str(i), answer=int(i < 7)) for i in range(10)]
    assert chance_level(same) == 0.7
    assert chance_level([*same[:9], replace(same[9], choices=("a bird", "a stone"))]) == 0.5
    assert chance_level(same[:1]) == 0.5


def test_chance_counts_questions_alone():
    assert chance_level([QUESTION, Problem("2", "?", "", "1")]) == 0.25


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (replace(QUESTION, context="Sky"), "sky which one flies?"),
        (Problem("1", "How\n many?", "", "1"), "how many?"),
        (Program("1", "def f():", "f", "", ""), "def f():"),
        (Instruction("1", "Sort", "b a", "a b"), "sort b a"),
        (Instruction("1", "Sort", "", "a b"), "sort"),
    ],
)
def test_every_kind_of_item_has_a_normalised_text_and_a_hash(item, text):
    assert normalised(item) == text
    assert data_hash([item]) != data_hash([replace(item, id="other")])


def test_a_context_changes_the_hash():
    assert data_hash([replace(QUESTION, context="Sky")]) != data_hash([QUESTION])


def test_a_content_id_sees_every_field_and_its_border():
    assert len({content_id("ab"), content_id("a", "b"), content_id("b", "a")}) == 3
    assert content_id("ab") == content_id("ab") and len(content_id("ab")) == 16
