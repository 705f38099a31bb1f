"""The worked example of CONTRIBUTING.md is a method: it keeps the contract as it stands there."""

from __future__ import annotations

import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from furina.adapters.base import _REGISTRY
from furina.suites import read_suite
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
    for name, test in vars(contract).items():
        if name.startswith("test_") and [*inspect.signature(test).parameters] == ["method"]:
            test(method)
    model_contract.test_padding_changes_no_output_loss_or_gradient(method)
    model_contract.test_two_evaluations_are_identical_and_keep_nothing(method)


def test_its_experiment_is_one_file_more(method: str, tmp_path: Path) -> None:
    (tmp_path / "defaults.yaml").write_text("steps: 3\n", encoding="utf-8")
    (tmp_path / f"{METHOD}.yaml").write_text(block("yaml"), encoding="utf-8")
    (run,) = read_suite(tmp_path).runs
    assert run.method == METHOD and run.steps == 3
