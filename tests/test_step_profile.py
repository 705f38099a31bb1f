"""benchmarks/step_profile.py: it tells apart what a step is made of."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
LINEARS = 14  # of the tiny Llama


@pytest.fixture
def step_profile(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("step_profile")


@pytest.mark.slow
def test_parts_and_operators_are_counted(step_profile, tmp_path, capsys):
    arguments = ["--backbone", "tiny-llama", "--rounds", "1", "--results", str(tmp_path)]
    step_profile.main(arguments)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(report["parts"]) == ["floor", "lora", "furina"]
    assert not report["parts"]["floor"]
    calls = {part: found["calls"] for part, found in report["parts"]["furina"].items()}
    assert calls["_LowRankProduct"] == calls["_Directions"] == LINEARS
    assert calls["_Activity"] == calls["_ActivityBackward"] == 1
    assert report["parts"]["lora"]["_LowRankProductBackward"]["calls"] == LINEARS
    assert "_Directions" not in report["parts"]["lora"]
    matmuls = {name: found["aten::mm"]["calls"] for name, found in report["operators"].items()}
    # A x and three gradients of each; the first q, k and v need none to the embeddings, which do
    # not train, and what is added in place is another operator.
    assert matmuls["lora"] - matmuls["floor"] == 4 * LINEARS - 3
    rows = {row["", "variant"].text: row for row in step_profile._whole_steps(report)}
    own = {name: row["", "norms, B̃, M and activity, ms"].numbers[""] for name, row in rows.items()}
    assert own["lora"] == 0 < own["furina"] < rows["furina"]["", "ms"].numbers[""]
    whole = sum(each["ms"] for each in report["operators"]["lora"].values())
    assert rows["lora"]["", "matrix products, ms"].numbers[""] < whole
    assert json.loads((tmp_path / "profile.json").read_text()) == report
    assert (tmp_path / "profile.md").read_text() == step_profile.markdown(report)


def test_a_part_that_a_round_lacks_took_no_time_in_it(step_profile):
    rounds = [{"a": {"ms": 2.0, "calls": 4}}, {}, {"a": {"ms": 4.0, "calls": 4}}]
    assert step_profile.medians(rounds) == {"a": {"ms": 2.0, "calls": 4}}


def test_wrong_input_is_one_sentence(step_profile, capsys):
    with pytest.raises(SystemExit, match="no variant is called lara"):
        step_profile.main(["--backbone", "tiny-llama", "--variants", "lara"])
    with pytest.raises(SystemExit):
        step_profile.main(["--rounds", "0"])
    assert "--rounds and --rows must be at least 1" in capsys.readouterr().err
