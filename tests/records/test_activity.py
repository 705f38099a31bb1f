"""What follows from the loads, against loops written from the definitions; and the file."""

from __future__ import annotations

import json
import math
import random
import statistics
from dataclasses import fields, replace
from pathlib import Path

import pytest

from furina.records import ActivityRecord, RecordError, TaskActivity, codec
from furina.records.activity import kind_of, layer_of
from tests.records.fake_activity import LINEARS, activity_record, task_activity

RECORD = activity_record()


def with_loads(frequency: list[float], share: list[float] | None = None) -> TaskActivity:
    """Return an activity of one linear."""
    one = tuple(frequency)
    return replace(
        task_activity("arc_easy"),
        top_k_share=(0.5,),
        entropy=(0.5,),
        frequency=(one,),
        share=(tuple(share or frequency),),
        first=(one,),
        shared_norm=None,
        routed_norm=None,
    )


def test_balance_variation_and_busiest_follow_their_definitions() -> None:
    task = task_activity("arc_easy")
    for i, (load, share) in enumerate(zip(task.frequency, task.share, strict=True)):
        n = len(load)
        balance = 0.0
        square = 0.0
        for f, p in zip(load, share, strict=True):
            balance += n * f * p
            square += (f - 1 / n) ** 2
        assert task.balance[i] == pytest.approx(balance)
        assert task.load_variation[i] == pytest.approx(math.sqrt(square / n) * n)
        assert task.busiest[i] == sorted(load)[-1]


def test_an_even_load_is_balanced_and_a_single_expert_is_as_far_off_as_can_be() -> None:
    even, alone = with_loads([0.2] * 5), with_loads([0.0, 0.0, 1.0, 0.0, 0.0])
    assert even.balance[0] == pytest.approx(1) and alone.balance[0] == pytest.approx(5)
    assert even.load_variation[0] == pytest.approx(0)
    assert alone.load_variation[0] == pytest.approx(2)  # sqrt(N − 1)
    assert (even.busiest[0], alone.busiest[0]) == (0.2, 1.0)


def test_an_even_load_is_balanced_whatever_the_shares() -> None:
    assert with_loads([0.25] * 4, [0.7, 0.1, 0.1, 0.1]).balance[0] == pytest.approx(1)
    assert with_loads([0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]).balance[0] == pytest.approx(2)


def test_the_shared_part_is_of_both_norms_and_unknown_where_nothing_is_added() -> None:
    task = replace(with_loads([1.0]), shared_norm=(3.0, 0.0, 0.0), routed_norm=(1.0, 2.0, 0.0))
    assert task.shared_part == (0.75, 0.0, None)
    assert task_activity("arc_easy", shared=False).shared_part is None


def test_overlap_is_the_load_on_the_same_experts() -> None:
    first, second = RECORD.tasks
    for i, found in enumerate(RECORD.overlap(first, second)):
        common = [min(a, b) for a, b in zip(first.frequency[i], second.frequency[i], strict=True)]
        assert found == pytest.approx(sum(common))
    assert RECORD.overlap(first, first) == pytest.approx([1.0] * len(LINEARS))
    apart = with_loads([0.5, 0.5, 0.0]), with_loads([0.0, 0.0, 1.0])
    assert RECORD.overlap(*apart) == (0.0,)


def single(*loads: list[float]) -> ActivityRecord:
    """Return a record of one linear whose experts come first that often in each task."""
    return replace(
        RECORD,
        linears=("layers.0.x",),
        experts=(len(loads[0]),),
        tasks=tuple(with_loads(load) for load in loads),
        examples=(),
        shown=(),
    )


def test_task_information_is_that_of_the_joint_distribution() -> None:
    loads = [[0.5, 0.3, 0.2, 0.0], [0.1, 0.3, 0.2, 0.4], [0.25, 0.25, 0.25, 0.25]]
    information = 0.0
    for load in loads:
        for expert, value in enumerate(load):
            joint = value / len(loads)
            marginal = sum(other[expert] for other in loads) / len(loads)
            if joint:
                information += joint * math.log(joint / (marginal / len(loads)))
    (found,) = single(*loads).task_information() or ()
    assert found == pytest.approx(information / math.log(3))


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([[0.2, 0.8, 0.0], [0.2, 0.8, 0.0]], 0.0),
        ([[0.2, 0.8, 0.0], [0.0, 0.0, 1.0]], 1.0),
        ([[1.0, 0.0], [1.0, 0.0]], 0.0),
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], 1.0),
    ],
)
def test_task_information_is_0_for_equal_tasks_and_1_for_disjoint_ones(
    loads: list[list[float]], expected: float
) -> None:
    assert single(*loads).task_information() == (pytest.approx(expected, abs=1e-12),)


def test_one_task_has_no_task_information() -> None:
    assert single([0.5, 0.5]).task_information() is None
    assert single([0.5, 0.5]).chance_information() is None


def test_chance_gives_what_drawing_the_same_experts_for_every_task_gives() -> None:
    luck = random.Random(0)
    weights, sizes, found = [0.1, 0.2, 0.3, 0.4], (300, 500, 900), []
    for _ in range(400):
        drawn = [luck.choices(range(4), weights, k=size) for size in sizes]
        loads = [[draw.count(e) / len(draw) for e in range(4)] for draw in drawn]
        found.append((single(*loads).task_information() or (0.0,))[0])
    record = single(*loads)
    tasks = zip(record.tasks, sizes, strict=True)
    record = replace(record, tasks=tuple(replace(task, tokens=size) for task, size in tasks))
    assert record.chance_information() == (pytest.approx(statistics.fmean(found), rel=0.1),)


def test_the_even_share_knows_linears_with_fewer_experts_than_k() -> None:
    record = replace(single([0.2, 0.8]), experts=(2,), top_k=3)
    assert record.even_top_k_share == (1.0,)
    assert RECORD.even_top_k_share == (0.5,) * len(LINEARS)


def test_a_linear_is_placed_by_its_name() -> None:
    assert (layer_of("model.layers.17.mlp.up_proj"), layer_of("first")) == (17, 0)
    assert (kind_of("model.layers.17.mlp.up_proj"), kind_of("first")) == ("up_proj", "first")


@pytest.mark.parametrize(
    "record",
    [RECORD, activity_record(shared=False, seed=None, task=""), activity_record(tasks=["boolq"])],
)
def test_a_record_reads_back_equal_and_is_written_alike(
    record: ActivityRecord, tmp_path: Path
) -> None:
    path = tmp_path / record.file_name
    record.write(path)
    first = path.read_bytes()
    assert ActivityRecord.read(path) == record
    ActivityRecord.read(path).write(path)
    assert path.read_bytes() == first
    assert list(json.loads(first)) == [field.name for field in fields(record)]


def test_a_list_of_numbers_takes_one_line(tmp_path: Path) -> None:
    RECORD.write(tmp_path / "record.json")
    lines = (tmp_path / "record.json").read_text().splitlines()
    assert len(lines) < 42 + 60 * len(RECORD.tasks)


def test_the_file_is_named_after_row_task_and_seed_as_far_as_known() -> None:
    assert RECORD.file_name == "furina--arc_easy--seed0.json"
    assert activity_record("mola", task="", seed=None).file_name == "mola.json"


def test_an_unknown_key_and_another_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for change, said in (({"exprts": []}, "unknown key 'exprts'"), ({"schema": 99}, "schema 99")):
        path.write_text(json.dumps(codec.encode(RECORD) | change))
        with pytest.raises(RecordError, match=said):
            ActivityRecord.read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"experts": (4,)}, "1 entries in experts, not 6"),
        ({"experts": (4, 4, 4, 4, 4, 3)}, "4 entries in a load of arc_easy, not 3"),
        ({"linears": LINEARS[:5], "experts": (4,) * 5}, "6 entries in a list of arc_easy, not 5"),
        ({"shown": ()}, "3 entries in an example of arc_easy, not 0"),
        (
            {"weights": replace(RECORD.weights, similarity=(0.1,))},
            "1 entries in a list of weights, not 6",
        ),
    ],
)
def test_lists_that_do_not_fit_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(RecordError, match=said):
        replace(RECORD, **change)  # type: ignore[arg-type]
