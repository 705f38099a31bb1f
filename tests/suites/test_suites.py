"""Some of a suite's runs are chosen by row, task and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furina.errors import ConfigurationError
from furina.suites import Suite, read_suite
from tests.suites.helpers import SEARCH, lora, write_suite


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    sweep = {"task": ["arc_easy", "openbookqa"]}
    files = {"base": {"method": "base"}, "narrow": lora(), "wide": lora(adapter={"rank": 32})}
    return read_suite(write_suite(tmp_path / "own", {"sweep": sweep}, **files))


def names(suite: Suite) -> list[str]:
    return [run.name for run in suite.runs]


def test_rows_and_tasks_are_chosen_by_name(suite: Suite) -> None:
    assert names(suite.chosen(["wide"], ["openbookqa"])) == ["wide--openbookqa--seed0"]
    assert len(suite.chosen(["base", "wide"]).runs) == 4
    assert suite.chosen(["all"], ["all"]) == suite.chosen() == suite


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rows": ["wid"]}, r"no runs of row 'wid'.*Did you mean 'wide'"),
        ({"tasks": ["openbook"]}, r"no runs of task 'openbook'.*Did you mean 'openbookqa'"),
        ({"seeds": 0}, "--seeds 0 must be at least 1"),
    ],
)
def test_what_the_suite_lacks_is_one_sentence(
    suite: Suite, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigurationError, match=said):
        suite.chosen(**options)


def test_seeds_are_the_first_ones_and_the_base_has_one(suite: Suite) -> None:
    seeded = suite.chosen(["base", "wide"], ["arc_easy"], seeds=3)
    assert names(seeded) == [
        "base--arc_easy--seed0",
        *(f"wide--arc_easy--seed{seed}" for seed in range(3)),
    ]


def test_full_takes_all_questions_into_records_of_its_own(suite: Suite) -> None:
    full = suite.chosen(["wide"], full=True)
    assert {(run.test_size, run.suite) for run in full.runs} == {(None, "own-full")}
    assert full.name == "own-full"
    assert full.command(full.runs[0]).endswith("own --rows wide --full")


def test_full_is_refused_where_it_would_be_ignored(tmp_path: Path) -> None:
    search = read_suite(write_suite(tmp_path / "s", SEARCH, a=lora()))
    with pytest.raises(ConfigurationError, match="--full would be ignored"):
        search.chosen(full=True)


def test_a_command_names_the_scale(tmp_path: Path) -> None:
    (tmp_path / "scales.yaml").write_text("cpu: {steps: 3}\n")
    suite = read_suite(write_suite(tmp_path / "s", {"cpu": {}}, a=lora()))
    assert suite.command(suite.runs[0]) == f"furina run {tmp_path / 's'} --scale cpu --rows a"
