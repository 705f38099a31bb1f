"""benchmarks/training/step_profile.py: it tells apart what a step is made of."""

from __future__ import annotations

import pytest

from benchmarks.training import step_profile
from tests.benchmarks.helpers import printed, written

LINEARS = 14  # of the tiny Llama


@pytest.mark.slow
def test_parts_and_operators_are_counted(tmp_path, capsys):
    arguments = ["--backbone", "tiny-llama", "--rounds", "1", "--results", str(tmp_path)]
    step_profile.main(arguments)
    report = printed(capsys)
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
    rows = {name: step_profile.whole_step(report, name) for name in report["operators"]}
    own = {name: row["norms, B̃, M and activity, ms"] for name, row in rows.items()}
    assert own["lora"] == 0 < own["furina"] < rows["furina"]["ms"]
    whole = sum(each["ms"] for each in report["operators"]["lora"].values())
    assert rows["lora"]["matrix products, ms"] < whole
    page = step_profile.page(report).markdown("profile")
    assert written(tmp_path / "profile") == (report, page)


def test_a_part_that_a_round_lacks_took_no_time_in_it():
    rounds = [{"a": {"ms": 2.0, "calls": 4}}, {}, {"a": {"ms": 4.0, "calls": 4}}]
    assert step_profile.medians(rounds) == {"a": {"ms": 2.0, "calls": 4}}


def test_wrong_input_is_one_sentence(capsys):
    with pytest.raises(SystemExit, match="no variant is called lara"):
        step_profile.main(["--backbone", "tiny-llama", "--variants", "lara"])
    with pytest.raises(SystemExit):
        step_profile.main(["--rounds", "0"])
    assert "--rounds must be at least 1" in capsys.readouterr().err
