from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from furina.records import RecordError, RunRecord, SearchRecord, SelectionRecord
from furina.records.codec import decode, dumps
from tests.records import fakes

RECORDS: dict[str, RunRecord | SearchRecord | SelectionRecord] = {
    "base": fakes.run_record("base", "arc_easy"),
    "trained": fakes.run_record("furina", "arc_easy"),
    "diverged": replace(
        fakes.run_record("lora", "arc_easy"),
        status="diverged",
        error="the loss was not finite at step 12",
        evaluations=(),
        latency=(),
        merge=None,
    ),
    "search": fakes.search_record("furina", "arc_easy", 5e-4, 0.6, 20.0),
    "diverged trial": fakes.search_record("lora", "arc_easy", 1.0, None),
    "selection": fakes.selection_record(0, 0.01, 0.4),
}


def edited(tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = tmp_path / "run.json"
    fakes.run_record("furina", "arc_easy").write(path)
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_reads_back_equal(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    record.write(tmp_path / record.file_name)
    assert type(record).read(tmp_path / record.file_name) == record


@pytest.mark.parametrize("name", RECORDS)
def test_every_field_of_the_dataclass_is_a_key_of_the_file(name: str, tmp_path: Path) -> None:
    record = RECORDS[name]
    record.write(tmp_path / "record.json")
    written = json.loads((tmp_path / "record.json").read_text())
    assert list(written) == [field.name for field in fields(record)]


@pytest.mark.parametrize("section", ["", "provenance", "training", "merge"])
def test_an_unknown_key_is_an_error_with_the_nearest_right_one(
    section: str, tmp_path: Path
) -> None:
    def misspell(value: dict[str, Any]) -> None:
        place = value[section] if section else value
        key = next(iter(place))
        place[f"{key}x"] = place.pop(key)

    with pytest.raises(RecordError, match=r"unknown key '(\w+)x'\. Did you mean '\1'\?"):
        RunRecord.read(edited(tmp_path, misspell))


@pytest.mark.parametrize(
    "key", [field.name for field in fields(RunRecord) if field.name != "schema"]
)
def test_a_missing_key_is_an_error_that_names_it(key: str, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=f"missing key '{key}'"):
        RunRecord.read(edited(tmp_path, lambda value: value.pop(key)))


def test_what_older_files_lack_has_its_default_there(tmp_path: Path) -> None:
    file = edited(tmp_path, lambda value: value["training"].pop("auxiliary_curve"))
    assert RunRecord.read(file).training.auxiliary_curve == ()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("seed",), "0", "seed must be a whole number, not '0'"),
        (("seed",), True, "seed must be a whole number, not True"),
        (("seed",), 1.0, "seed must be a whole number, not 1.0"),
        (("task",), None, "task must be text, not None"),
        (("status",), "sucess", "Did you mean 'success'"),
        (("evaluations", 0, "variant"), "fused", "variant is 'fused'"),
        (("evaluations", 0, "value"), "0.5", "value must be a number"),
        (("training",), [], "must be an object with the keys"),
        (("training", "loss_curve", 0), [1], "must hold 2 values, not 1"),
        (("training", "loss_curve", 0, 1), "1.0", r"loss_curve\[0\]\[1\] must be a number"),
        (("provenance", "packages"), [], "packages must be"),
        (("latency",), {}, "latency must be"),
        (("schema",), 0, "has schema 0 and this version of furina reads 2"),
    ],
)
def test_a_wrong_value_is_an_error_that_says_where(
    path: tuple[str | int, ...], value: object, message: str, tmp_path: Path
) -> None:
    def spoil(place: Any) -> None:
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    with pytest.raises(RecordError, match=message) as caught:
        RunRecord.read(edited(tmp_path, spoil))
    assert "\n" not in str(caught.value)
    assert "run.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"schema": NaN}', "\ufeff"])
def test_a_damaged_file_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecordError, match=r"run\.json.*\.$"):
        RunRecord.read(tmp_path / "run.json")


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there is no such record"):
        RunRecord.read(tmp_path / "run.json")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused_and_nothing_is_written(
    loss: float, tmp_path: Path
) -> None:
    record = fakes.run_record("lora", "arc_easy")
    assert record.training
    bad = replace(record, training=replace(record.training, final_loss=loss))
    with pytest.raises(RecordError, match="finite numbers or null"):
        bad.write(tmp_path / "run.json")
    assert not list(tmp_path.iterdir())


def test_writing_over_a_record_leaves_no_other_file(tmp_path: Path) -> None:
    for seed in (0, 1):
        fakes.run_record("lora", "arc_easy", seed).write(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert RunRecord.read(tmp_path / "run.json").seed == 1


def test_a_point_of_a_curve_takes_one_line(tmp_path: Path) -> None:
    record = fakes.run_record("lora", "arc_easy")
    record.write(tmp_path / "run.json")
    assert record.training
    step, loss = record.training.loss_curve[0]
    lines = (tmp_path / "run.json").read_text().splitlines()
    assert f"[{step}, {loss}]," in [line.strip() for line in lines]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_the_compact_form_is_the_same_json(value: object) -> None:
    assert json.loads(dumps(value)) == value


def test_an_integer_is_read_where_a_float_is_declared() -> None:
    value = decode(float, 3, "x")
    assert (type(value), value) == (float, 3.0)


@pytest.mark.parametrize(
    ("config", "row"),
    [({}, "furina"), ({"row": ""}, "furina"), ({"row": "no-shared"}, "no-shared")],
)
def test_a_record_is_filed_under_its_row_which_is_its_method_where_nothing_is_said(
    config: dict[str, object], row: str
) -> None:
    record = replace(fakes.run_record("furina", "arc_easy", 3), config=config)
    assert record.row == row
    assert record.file_name == f"{row}--arc_easy--seed3.json"


def test_file_names_hold_everything_that_is_varied() -> None:
    searched = [
        fakes.search_record("furina", "arc_easy", rate, 0.5, multiplier, seed)
        for rate in (2e-4, 5e-4)
        for multiplier in (None, 1.0, 20.0)
        for seed in (0, 1)
    ]
    assert len({record.file_name for record in searched}) == len(searched)
    studied = [fakes.selection_record(s, c, 0.4) for s in (0, 1) for c in (0.0, 0.01)]
    assert len({record.file_name for record in studied}) == len(studied)


def test_asdict_of_a_record_is_what_is_written(tmp_path: Path) -> None:
    for record in (RECORDS["trained"], RECORDS["search"], RECORDS["selection"]):
        record.write(tmp_path / "record.json")
        assert json.loads((tmp_path / "record.json").read_text()) == json.loads(
            json.dumps(asdict(record))
        )
