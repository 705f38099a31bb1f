"""The worked example of CONTRIBUTING.md is a method: it keeps the contract as it stands there."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from furina.adapters.base import _REGISTRY
from furina.runner import read_suite
from tests.adapters import test_contract as contract
from tests.adapters import test_model_contract as model_contract

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
METHOD = "rowscale"


def block(language: str) -> str:
    found = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    assert len(found) == 1
    return found[0]


@pytest.fixture
def method() -> Iterator[str]:
    module = types.ModuleType(f"furina.adapters.{METHOD}")
    sys.modules[module.__name__] = module  # where dataclasses look up what a method's file imports
    exec(compile(block("python"), "CONTRIBUTING.md", "exec"), module.__dict__)
    yield METHOD
    del _REGISTRY[METHOD], sys.modules[module.__name__]


def test_the_example_keeps_the_contract(method: str) -> None:
    contract.test_the_parameter_count_is_the_closed_form_for_every_switch(method)
    contract.test_a_method_says_what_it_is(method)
    contract.test_every_start_is_the_base_layer_for_every_switch(method)
    contract.test_every_slice_and_entry_gets_a_gradient_from_the_task_alone_for_every_switch(method)
    contract.test_a_method_is_additive_in_its_input_exactly_when_it_says_that_it_merges(method)
    contract.test_merged_equals_unmerged_to_1e_12_per_linear_for_every_switch(method)
    model_contract.test_padding_changes_no_output_loss_or_gradient(method)
    model_contract.test_two_evaluations_are_identical_and_keep_nothing(method)


def test_its_experiment_is_one_file_more(method: str, tmp_path: Path) -> None:
    (tmp_path / "defaults.yaml").write_text("steps: 3\n", encoding="utf-8")
    (tmp_path / f"{METHOD}.yaml").write_text(block("yaml"), encoding="utf-8")
    (run,) = read_suite(tmp_path).runs
    assert run.method == METHOD and run.steps == 3
