"""A suite is read strictly: from its defaults, its scale, its rows and the rows they are like."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from furina.errors import ConfigurationError
from furina.suites import files, read_suite
from furina.suites.files import SHIPPED
from furina.suites.reading import _VARIED
from tests.records.fakes import search_record, selection_record
from tests.suites.helpers import SEARCH, lora, values, write_suite


def test_defaults_hold_for_all_files_and_each_overrides_them(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "own", {"steps": 3}, a=lora(seed=1), b=lora(steps=4))
    suite = read_suite(folder)
    assert (suite.name, suite.study, suite.scale) == ("own", "cells", None)
    assert values(suite, "suite", "steps", "seed") == [("own", 3, 1), ("own", 4, 0)]


def test_a_mapping_sweeps_over_all_combinations(tmp_path: Path) -> None:
    name, factors = "magnitude_lr_multiplier", [2.0, 4.0]
    own = {"method": "furina", "sweep": {"seed": [0, 1], f"adapter.{name}": factors}}
    suite = read_suite(write_suite(tmp_path / "s", SEARCH, a=own))
    assert values(suite, "seed", name) == list(itertools.product([0, 1], factors))


def test_a_list_sweeps_over_its_points(tmp_path: Path) -> None:
    sweep = [{"seed": 0, "adapter.rank": 2}, {"seed": 1}]
    suite = read_suite(write_suite(tmp_path / "s", {}, a=lora(adapter={"rank": 8}, sweep=sweep)))
    assert values(suite, "seed", "rank") == [(0, 2), (1, 8)]


def test_the_sweeps_of_defaults_and_file_are_multiplied(tmp_path: Path) -> None:
    shared, own = {"task": ["arc_easy", "openbookqa"]}, {"seed": [0, 1]}
    folder = write_suite(tmp_path / "s", {"sweep": shared}, a=lora(sweep=own))
    assert values(read_suite(folder), "task", "seed") == [
        *(("arc_easy", 0), ("arc_easy", 1)),
        *(("openbookqa", 0), ("openbookqa", 1)),
    ]


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"sweep": {"seed": [5, 6]}}, [(5, 2), (5, 4), (6, 2), (6, 4)]),
        ({"seed": 7}, [(7, 2), (7, 4)]),
        ({"adapter": {"magnitude_lr_multiplier": 3.0}}, [(0, 3.0), (1, 3.0)]),
        ({"seed": 7, "adapter": {"magnitude_lr_multiplier": 3.0}}, [(7, 3.0)]),
    ],
)
def test_what_a_file_says_wins_over_the_sweep_of_defaults_and_leaves_no_duplicates(
    tmp_path: Path, own: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    name = "magnitude_lr_multiplier"
    defaults = {**SEARCH, "sweep": {"seed": [0, 1], f"adapter.{name}": [2.0, 4.0]}}
    suite = read_suite(write_suite(tmp_path / "s", defaults, a={"method": "furina", **own}))
    assert sorted(values(suite, "seed", name)) == expected


@pytest.mark.parametrize(
    ("defaults", "content", "file", "said"),
    [
        ({"study": "serch"}, lora(), "defaults", "unknown study 'serch'. Did you mean 'search'"),
        ({"stepz": 3}, lora(), "defaults", "'stepz'. Did you mean 'steps'"),
        ({}, lora(stepz=3), "a", "'stepz'. Did you mean 'steps'"),
        ({}, lora(sweep={"stepz": [3]}), "a", "'stepz'. Did you mean 'steps'"),
        ({}, lora(adapter={"rnk": 3}), "a", "'rnk'. Did you mean 'rank'"),
        ({}, lora(sweep={"adapter.rnk": [3]}), "a", "'rnk'. Did you mean 'rank'"),
        ({}, {"method": "lorra"}, "a", "'lorra'. Did you mean 'lora'"),
        ({}, lora(task="arc_esy"), "a", "'arc_esy'. Did you mean 'arc_easy'"),
        ({}, lora(learning_rate="5e-4"), "a", "learning_rate must be a number"),
        ({}, lora(steps=0), "a", "steps=0 must be at least 1"),
        ({}, lora(learning_rate="1e-3"), "a", "write 1.0e-3"),
        ({}, lora(row="a/b"), "a", "leave out slashes"),
        ({}, lora(suite="other"), "a", "leave out suite; it is the folder's name"),
        ({}, lora(cpu={"steps": 3}), "a", "section cpu has no effect: the suite has one scale"),
        ({}, lora(adapter=None), "a", "adapter must hold options"),
        ({}, lora(sweep={"seed": 0}), "a", "sweep must map fields to lists"),
        ({}, lora(sweep={"seed": []}), "a", "sweep must map fields to lists"),
        ({}, lora(sweep=[0, 1]), "a", "sweep must map fields to lists"),
        ({"sweep": {"task": "arc_easy"}}, lora(), "defaults", "sweep must map fields to lists"),
        ({"adapter": {"dropout": 0.1}}, lora(), "defaults", "where the method is named"),
        ({"targets": ["q_proj"]}, {"method": "base"}, "a", "method base trains nothing"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_file(
    tmp_path: Path, defaults: dict[str, Any], content: dict[str, Any], file: str, said: str
) -> None:
    folder = write_suite(tmp_path / "s", defaults, a=content)
    with pytest.raises(ConfigurationError) as caught:
        read_suite(folder)
    assert str(folder / f"{file}.yaml") in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [("method: [", "is not YAML"), ("- lora", "must hold options"), ("", "must hold options")],
)
def test_a_file_that_holds_no_options_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    folder = write_suite(tmp_path / "s", {}, a=lora())
    (folder / "a.yaml").write_text(text)
    with pytest.raises(ConfigurationError, match=said) as caught:
        read_suite(folder)
    assert str(folder / "a.yaml") in str(caught.value) and "\n" not in str(caught.value)


def test_the_defaults_may_leave_the_task_to_the_sweep(tmp_path: Path) -> None:
    shared = {"protocol": "cot", "sweep": {"task": ["gsm8k", "mawps"]}}
    suite = read_suite(write_suite(tmp_path / "s", shared, a=lora()))
    assert [run.task for run in suite.runs] == ["gsm8k", "mawps"]
    folder = write_suite(tmp_path / "t", {"protocol": "cot"}, a=lora())
    with pytest.raises(ConfigurationError, match="Protocol cot cannot ask arc_easy"):
        read_suite(folder)


def test_a_folder_that_is_no_suite_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no suite"):
        read_suite(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="holds no runs"):
        read_suite(write_suite(tmp_path / "empty", {}))


def test_two_cells_of_one_name_are_refused_before_one_overwrites_the_other(tmp_path: Path) -> None:
    folder = write_suite(tmp_path / "s", {}, a=lora(sweep={"learning_rate": [0.1, 0.2]}))
    with pytest.raises(ConfigurationError, match="more than one run of a on arc_easy, seed 0"):
        read_suite(folder)


def test_two_trials_that_differ_in_nothing_their_records_name_are_refused(tmp_path: Path) -> None:
    shared = {"study": "search"}
    varied = {"learning_rate": [0.1, 0.2], "steps": [3, 4]}
    assert len(read_suite(write_suite(tmp_path / "ok", shared, a=lora(sweep=varied))).runs) == 4
    folder = write_suite(tmp_path / "s", shared, a=lora(sweep={"batch_size": [8, 16]}))
    with pytest.raises(
        ConfigurationError, match="differ in none of: protocol, learning_rate, steps"
    ):
        read_suite(folder)


@pytest.mark.parametrize(
    ("study", "record"),
    [
        ("search", search_record("lora", "arc_easy", 0.1, 0.5)),
        ("selection", selection_record(0, 0.1, 0.5)),
    ],
)
def test_records_are_named_by_all_that_runs_of_a_study_may_differ_in(study, record) -> None:
    """A field is varied exactly if another value of it gives the record another name."""
    changes = {
        "protocol": {"protocol": "label"},
        "learning_rate": {"learning_rate": 0.3},
        "steps": {"steps": 7},
        "adapter.magnitude_lr_multiplier": {"magnitude_multiplier": 3.0},
        "adapter.selection_reduction": {"reduction": "mean"},
        "adapter.selection_coefficient": {"coefficient": 0.7},
    }
    fields = {field.name for field in dataclasses.fields(record)}
    naming = {
        name
        for name, change in changes.items()
        if set(change) <= fields
        and dataclasses.replace(record, **change).file_name != record.file_name
    }
    assert naming == set(_VARIED[study])


def test_a_suite_is_named_by_its_folder_wherever_it_is_called_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_suite(tmp_path / "own", {}, a=lora()))
    suite = read_suite(Path("."))
    assert (suite.name, suite.runs[0].suite) == ("own", "own")


# Rows


def test_a_row_is_called_by_its_file_and_by_its_method_where_both_agree(tmp_path: Path) -> None:
    suite = read_suite(write_suite(tmp_path / "s", {}, lora=lora(), wide=lora(adapter={"rank": 9})))
    assert [(run.row, run.name) for run in suite.runs] == [
        ("", "lora--arc_easy--seed0"),
        ("wide", "wide--arc_easy--seed0"),
    ]


def test_a_sweep_may_name_rows(tmp_path: Path) -> None:
    sweep = [{"row": "r2", "adapter.rank": 2}, {"row": "r4", "adapter.rank": 4}]
    suite = read_suite(write_suite(tmp_path / "s", {}, ranks=lora(sweep=sweep)))
    assert suite.rows == ["r2", "r4"] and values(suite, "rank") == [(2,), (4,)]


def test_a_row_that_is_like_another_takes_its_options_and_overrides_them(tmp_path: Path) -> None:
    first = {"method": "furina", "learning_rate": 0.1, "adapter": {"rank": 2, "num_experts": 4}}
    write_suite(tmp_path / "first", {"steps": 3}, furina=first)
    own = {"like": "first/furina", "adapter": {"rank": 8}}
    further = {"like": "second/wide", "learning_rate": 0.2}
    suite = read_suite(write_suite(tmp_path / "second", {"steps": 5}, wide=own, z=further))
    names = ("row", "method", "steps", "learning_rate", "rank", "num_experts")
    assert values(suite, *names) == [
        ("wide", "furina", 5, 0.1, 8, 4),
        ("z", "furina", 5, 0.2, 8, 4),
    ]


def test_options_of_another_method_are_not_taken_over(tmp_path: Path) -> None:
    write_suite(tmp_path / "a", {}, furina={"method": "furina", "adapter": {"num_experts": 4}})
    own = {"like": "a/furina", "method": "lora", "adapter": {"rank": 3}}
    (run,) = read_suite(write_suite(tmp_path / "b", {}, x=own)).runs
    assert (run.method, run.adapter) == ("lora", {"rank": 3})


@pytest.mark.parametrize("like", ["a/nothing", "b/x"])
def test_a_row_that_is_like_none_or_itself_is_one_sentence(tmp_path: Path, like: str) -> None:
    write_suite(tmp_path / "a", {}, lora=lora())
    folder = write_suite(tmp_path / "b", {}, x={"like": like})
    with pytest.raises(ConfigurationError, match=f"like: {like} must name another row") as caught:
        read_suite(folder)
    assert str(folder / "x.yaml") in str(caught.value)


# Scales


SCALES = {
    "cpu": {"steps": 3, "learning_rate": 0.1, "protocol": "text"},
    "paper": {"steps": None, "epochs": 2, "sweep": {"backbone": ["org/Big", "org/Bigger"]}},
}


def write_scales(root: Path, **changes: Any) -> None:
    (root / "scales.yaml").write_text(yaml.safe_dump({**SCALES, **changes}))


def test_later_files_and_the_scale_win_over_what_comes_before(tmp_path: Path) -> None:
    write_scales(tmp_path)
    defaults = {"seed": 1, "cpu": {"seed": 2, "batch_size": 8}, "paper": {}}
    own = lora(batch_size=4, cpu={"adapter": {"rank": 3}}, paper={"adapter": {"rank": 5}})
    folder = write_suite(tmp_path / "s", defaults, a=own)
    names = ("suite", "steps", "epochs", "learning_rate", "seed", "batch_size", "rank")
    assert values(read_suite(folder), *names) == [("s-cpu", 3, None, 0.1, 2, 4, 3)]
    assert values(read_suite(folder, "paper"), *names) == [
        (f"s-paper-{name}", None, 2, 5e-4, 1, 4, 5) for name in ("big", "bigger")
    ]


def test_a_suites_sweep_wins_over_that_of_its_scale(tmp_path: Path) -> None:
    write_scales(tmp_path)
    defaults = {"cpu": {}, "paper": {"sweep": {"backbone": ["org/Own"]}}}
    folder = write_suite(tmp_path / "s", defaults, a=lora(sweep={"seed": [0, 1]}))
    suite = read_suite(folder, "paper")
    assert values(suite, "suite", "backbone", "seed") == [
        ("s-paper", "org/Own", 0),
        ("s-paper", "org/Own", 1),
    ]


def test_what_a_task_has_instead_gives_way_to_the_suite_and_the_row(tmp_path: Path) -> None:
    write_scales(
        tmp_path,
        cpu={**SCALES["cpu"], "by_task": {"boolq": {"steps": 2, "test_size": 8, "seed": 5}}},
    )
    defaults = {"cpu": {"seed": 1}, "sweep": {"task": ["arc_easy", "boolq"]}}
    plain, own = lora(), lora(test_size=9)
    swept = lora(sweep={"steps": [7]})
    folder = write_suite(tmp_path / "s", defaults, a=plain, b=own, c=swept)
    assert values(read_suite(folder), "row", "task", "steps", "test_size", "seed") == [
        ("a", "arc_easy", 3, 500, 1),
        ("a", "boolq", 2, 8, 1),
        ("b", "arc_easy", 3, 9, 1),
        ("b", "boolq", 2, 9, 1),
        ("c", "arc_easy", 7, 500, 1),
        ("c", "boolq", 7, 8, 1),
    ]


@pytest.mark.parametrize(
    ("by_task", "said"),
    [
        ({"boolk": {"steps": 2}}, "Did you mean 'boolq'"),
        ({"boolq": {"stebs": 2}}, "stebs"),
        ({"boolq": 2}, "by_task must map tasks to options"),
        ([1], "by_task must map tasks to options"),
        (None, "by_task must map tasks to options"),
    ],
)
def test_what_an_unknown_task_has_instead_is_one_sentence(
    tmp_path: Path, by_task: Any, said: str
) -> None:
    write_scales(tmp_path, cpu={"by_task": by_task})
    with pytest.raises(ConfigurationError, match=said) as caught:
        read_suite(write_suite(tmp_path / "s", {"cpu": {}}, a=lora()))
    assert str(caught.value).startswith(str(tmp_path / "scales.yaml"))


@pytest.mark.parametrize(
    ("defaults", "scale", "said"),
    [
        ({}, "cpu", "has one scale only: leave out --scale cpu"),
        ({"paper": {}}, None, "has no scale cpu: paper"),
        ({"cpu": {}}, "paper", "has no scale paper: cpu"),
        ({"cpu": [1]}, "cpu", "cpu must hold options"),
    ],
)
def test_a_scale_that_is_not_there_is_one_sentence(
    tmp_path: Path, defaults: dict[str, Any], scale: Any, said: str
) -> None:
    write_scales(tmp_path)
    with pytest.raises(ConfigurationError, match=said):
        read_suite(write_suite(tmp_path / "s", defaults, a=lora()), scale)


def test_a_suite_is_found_by_its_name_in_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_suite(tmp_path / "experiments" / "own", {}, a=lora())
    monkeypatch.chdir(tmp_path)
    suite = read_suite("own")
    assert suite.command(suite.runs[0]) == "furina run own --rows a"
    with pytest.raises(ConfigurationError, match=r"no suite owm.*Did you mean 'own'"):
        read_suite("owm")


# Elsewhere


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a shipped suite alone to a folder without experiments/."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(SHIPPED / "forgetting", tmp_path / "mine"))


def test_a_copied_suite_finds_beside_the_shipped_ones_what_it_names(copied: Path) -> None:
    mine, shipped = read_suite(copied, "cpu"), read_suite(SHIPPED / "forgetting", "cpu")
    assert [run.cell for run in mine.runs] == [run.cell for run in shipped.runs]
    assert {run.suite for run in mine.runs} == {"mine-cpu"}


def test_what_stands_beside_a_copied_suite_wins_over_what_is_shipped(copied: Path) -> None:
    (copied.parent / "scales.yaml").write_text("cpu: {steps: 3}\n")
    write_suite(copied.parent / "main", {}, lora=lora(adapter={"rank": 5}), base={"method": "base"})
    (run, *_) = read_suite(copied, "cpu", ["lora"]).runs
    assert run.adapter == {"rank": 5}


def test_rows_that_are_not_asked_for_need_not_be_right(tmp_path: Path) -> None:
    wrong = {"like": "gone/away"}
    folder = write_suite(tmp_path / "s", {}, a=lora(), b=wrong, c=lora(adapter={"rnk": 3}))
    (folder / "d.yaml").write_text("method: [")
    assert read_suite(folder, rows=["a"]).rows == ["a"]
    for row, said in (("b", "must name another row"), ("c", "'rnk'"), ("d", "is not YAML")):
        with pytest.raises(ConfigurationError, match=said):
            read_suite(folder, rows=["a", row])
    with pytest.raises(ConfigurationError, match="must name another row"):
        read_suite(folder)


def test_a_row_is_asked_for_by_what_its_file_calls_it(tmp_path: Path) -> None:
    sweep = [{"row": "r2", "adapter.rank": 2}, {"row": "r4", "adapter.rank": 4}]
    folder = write_suite(tmp_path / "s", {}, ranks=lora(sweep=sweep), x=lora(row="y"), z=lora())
    assert read_suite(folder, rows=["r4"]).rows == ["r4"]
    assert read_suite(folder, rows=["y", "z"]).rows == ["y", "z"]
    with pytest.raises(ConfigurationError, match=r"no runs of row 'x'.*Known: all, r2, r4, y, z"):
        read_suite(folder, rows=["x"])


def test_the_shipped_suites_are_known_outside_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    suite = read_suite("quickstart")
    assert suite.name == "quickstart"
    assert suite.command(suite.runs[0]).startswith("furina run quickstart ")
    with pytest.raises(ConfigurationError, match="Did you mean 'quickstart'"):
        read_suite("quikstart")


def test_where_no_suites_are_shipped_a_name_is_answered_with_where_they_lie(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHIPPED", copied.parent / "site-packages" / "experiments")
    for path in ("main", copied):
        with pytest.raises(ConfigurationError) as caught:
            read_suite(path, "cpu")
        assert "lie in experiments/ of a checkout of furina" in str(caught.value)
        assert "(none)" not in str(caught.value)
