"""Every suite in experiments/ can be read at each of its scales and builds its adapters."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from furina import adapt, describe, without_router
from furina.cli.commands import COMMANDS
from furina.cli.parsing import parse
from furina.data.tasks import get_task
from furina.suites import Suite, read_suite
from furina.suites.reading import SCALES

ROOT = Path(__file__).parents[2] / "experiments"
SUITES = sorted(path.parent for path in ROOT.glob("*/defaults.yaml"))
FILES = sorted(ROOT.glob("*/*.yaml"))


def scales_of(folder: Path) -> list[str | None]:
    content = yaml.safe_load((folder / "defaults.yaml").read_text())
    return [scale for scale in SCALES if scale in content] or [None]


AT_SCALE = [(folder, scale) for folder in SUITES for scale in scales_of(folder)]


def smollm2_without_weights(layers: int) -> torch.nn.Module:
    """Return a model of SmolLM2-135M's shapes, which the ranks of the cpu scale are for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sides = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sides, **heads))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(("folder", "scale"), AT_SCALE)
def test_every_suite_is_read_at_each_of_its_scales(folder: Path, scale: str | None) -> None:
    suite = read_suite(folder, scale)
    assert suite.runs and suite.scale == scale
    assert all(get_task(task) for run in suite.runs for task in run.trained)
    names = [(run.suite, run.name) for run in suite.runs]
    assert suite.study != "cells" or len(names) == len(set(names))


def test_every_run_on_this_scale_builds_its_adapter() -> None:
    suites = [read_suite(folder, scale) for folder, scale in AT_SCALE if scale != "paper"]
    made = {
        json.dumps([run.method, run.adapter, run.targets, run.score_without_router])
        for suite in suites
        for run in suite.runs
        if not run.is_base
    }
    for options in made:
        method, adapter, targets, loses_router = json.loads(options)
        layers = 30 if "allocation" in adapter else 1
        model = adapt(smollm2_without_weights(layers), method, targets=targets, **adapter)
        assert describe(model).trainable > 0
        if loses_router:
            left = describe(without_router(model))
            assert left.trainable == left.trainable_without_router > 0


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_the_first_line_of_a_file_is_the_command_that_runs_it(file: Path) -> None:
    program, command, *words = shlex.split(file.read_text().splitlines()[0].removeprefix("# "))
    options = parse(COMMANDS[command].parser(words), words)
    assert (program, command, options.suite) == ("furina", "run", file.parent.name)
    assert options.rows == (["all"] if file.stem == "defaults" else [file.stem])
    assert file.stem == "defaults" or file.stem in rows(file.parent)


def rows(folder: Path) -> list[str]:
    return read_suite(folder, scales_of(folder)[0]).rows


def test_no_suite_holds_a_cell_twice() -> None:
    for folder, scale in AT_SCALE:
        suite = read_suite(folder, scale)
        cells = [json.dumps(run.cell.to_dict(), sort_keys=True) for run in suite.runs]
        # One value of each curve is the default, so both curves of the figure have its cell.
        shared = 4 if suite.name.startswith("sensitivity") else 0
        assert len(cells) - len(set(cells)) in (0, shared, 3 * shared // 2), suite.name


PAPER_TASKS = 7
MAIN_METHODS = {"base", "lora", "dora", "mixlora", "loramoe", "mola", "slim", "furina"}


def main(scale: str) -> Suite:
    return read_suite(ROOT / "main", scale)


@pytest.mark.parametrize("scale", SCALES)
def test_the_main_suite_has_the_papers_rows_and_tasks(scale: str) -> None:
    suite = main(scale)
    assert set(suite.rows) == MAIN_METHODS | {"furina-no-shared"}
    assert len({run.task for run in suite.runs}) == PAPER_TASKS
    assert len({run.backbone for run in suite.runs}) == (3 if scale == "paper" else 1)


@pytest.mark.parametrize("scale", SCALES)
def test_the_methods_of_a_table_share_data_budget_and_prompt(scale: str) -> None:
    """Only what defines a method, and its tuned learning rate, may differ between rows."""
    own = {"method", "row", "adapter", "learning_rate", "score_without_router"}
    by_cell: dict[tuple[str, str], set[str]] = {}
    for run in main(scale).runs:
        shared = {key: value for key, value in run.to_dict().items() if key not in own}
        by_cell.setdefault((run.backbone, run.task), set()).add(json.dumps(shared, sort_keys=True))
    assert all(len(kinds) == 1 for kinds in by_cell.values())
