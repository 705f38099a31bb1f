"""Audits count what can be counted by hand in a few rows."""

from __future__ import annotations

import pytest

from furina.data.audit import Leakage, audit, leakage, ngrams, split_facts
from furina.data.items import Problem, Question
from furina.errors import DataError


def _problem(number, text):
    return Problem(str(number), text, "", "1")


def _question(number, text, answer):
    return Question(str(number), text, ("a", "b"), answer)


def test_runs_of_words_are_counted_in_the_normalised_text():
    assert list(ngrams(_problem(1, "One  two THREE\nfour"), 3)) == [
        "one two three",
        "two three four",
    ]
    assert list(ngrams(_problem(1, "One two"), 3)) == ["one two"]


def test_leakage_by_hand():
    train = [_problem(1, "a b c d e f"), _problem(2, "short one"), _problem(3, "x y z")]
    test = [
        _problem(4, "A  B c D e F"),  # the whole text, so its runs as well
        _problem(5, "and c d e then"),  # the run "c d e"
        _problem(6, "Short one"),  # shorter than a run, whole
        _problem(7, "short"),  # shorter than a run, and only a part of a train text
        _problem(8, "b c and d e"),  # words of train, no run of three
    ]
    assert leakage(train, test, 3) == Leakage(test_rows=5, exact=2, ngram=3)
    assert leakage(train, test, 4) == Leakage(test_rows=5, exact=2, ngram=2)


def test_thirteen_words_are_the_default():
    words = [f"w{n}" for n in range(20)]
    train = [_problem(1, " ".join(words))]
    assert leakage(train, [_problem(2, " ".join(["new", *words[3:16]]))]).ngram == 1
    assert leakage(train, [_problem(2, " ".join(["new", *words[3:15], "end"]))]).ngram == 0


def test_facts_of_a_split_by_hand():
    rows = [_question(1, "Up?", 0), _question(2, "up? ", 1), _question(3, "Down?", 1)]
    facts = split_facts(rows, 10)
    assert (facts.rows, facts.public_rows, facts.duplicates) == (3, 10, 1)
    assert facts.labels == {"A": 1, "B": 2}
    assert split_facts([_problem(1, "?")], 1).labels == {}


def test_an_audit_reads_every_split_of_the_source(data_dir):
    done = audit("arc_easy", "folder", data_dir)
    assert (done.task, done.source, done.ngram_size) == ("arc_easy", "folder", 13)
    assert {split: facts.rows for split, facts in done.splits.items()} == {
        "train": 5,
        "validation": 5,
        "test": 5,
    }
    assert done.leakage == Leakage(5, 5, 5)  # the same five rows everywhere


def test_without_train_there_is_no_leakage(data_dir, write_rows):
    row = {"problem": "?", "solution": r"\boxed{1}"}
    write_rows(data_dir / "math" / "test.jsonl.gz", [row])
    assert audit("math", "folder", data_dir).leakage is None


def test_an_audit_of_nothing_is_one_sentence(wheel_cache):
    with pytest.raises(DataError, match="addsub has no test split in the wheel"):
        audit("addsub", "wheel")
