"""The scaling benchmark: its FLOPs are counted, its tables those of its JSON."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.show import write
from benchmarks.training import scaling, scaling_page, scaling_points
from furina.kernels.directions import DENSE
from tests.benchmarks.helpers import written

ARGUMENTS = ["--quick", "--rounds", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def output(folder: Path) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as written, contextlib.suppress(SystemExit):
        scaling.main([*ARGUMENTS, "--results", str(folder)])
    return written.getvalue().splitlines()


@pytest.fixture(scope="module")
def report(output: list[str]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(output[-1])
    return made


def test_the_last_line_is_what_the_file_holds(report: dict[str, Any], folder: Path) -> None:
    assert written(folder / "scaling")[0] == report
    assert set(report) == {"command", "settings", "environment", "points", "backbones"}
    assert report["environment"]["packages"]["torch"]
    assert str(folder) not in json.dumps(report)


def test_every_sweep_is_there_and_every_linear_of_a_backbone(report: dict[str, Any]) -> None:
    points = report["points"]
    assert len({point["series"] for point in points}) == 6
    for name in ("Llama-3.2-3B", "Qwen2-7B"):
        linears = [linear for p in points if p["backbone"] == name for linear in p["linears"]]
        assert sorted(linears) == sorted(["q", "k", "v", "o", "gate", "up", "down"])


def test_a_frozen_linear_is_two_products_and_lora_three_more_a_factor(
    report: dict[str, Any],
) -> None:
    ranks = [p["num_experts"] * p["rank"] for p in report["points"] if "furina" in p["variants"]]
    assert min(ranks) <= DENSE < max(ranks)
    for point in report["points"]:
        tokens, d, k = (point[key] for key in ("tokens", "in_features", "out_features"))
        found = {name: each["flops"] for name, each in point["variants"].items()}
        added = 6 * tokens * point["num_experts"] * point["rank"] * (d + k)
        assert found["frozen"] == 4 * tokens * d * k
        assert found["lora"] == found["frozen"] + added < found["furina_no_loss"]


def test_a_selection_loss_needs_experts_to_select_from(report: dict[str, Any]) -> None:
    for point in report["points"]:
        assert ("furina" in point["variants"]) == (point["num_experts"] > 3)


def test_what_is_kept_is_counted_and_the_same_each_time(report: dict[str, Any]) -> None:
    saved = {}
    for point in report["points"]:
        found = {name: each["saved_bytes"] for name, each in point["variants"].items()}
        assert found["frozen"] == 0
        assert 2 * point["tokens"] * point["in_features"] < found["lora"] < found["furina_no_loss"]
        sides = point["tokens"], point["in_features"], point["out_features"]
        key = *sides, point["num_experts"], point["rank"]
        assert saved.setdefault(key, found) == found
    assert len(saved) < len(report["points"])  # some were measured twice


def test_a_backbone_is_its_layers_linears(report: dict[str, Any]) -> None:
    sizes = {"Llama-3.2-3B": (3072, 1024, 8192), "Qwen2-7B": (3584, 512, 18944)}
    for cost in report["backbones"]:
        hidden, keys, ffn = (side // 64 for side in sizes[cost["backbone"]])
        weights = 28 * hidden * (2 * hidden + 2 * keys + 3 * ffn)
        found = cost["variants"]
        assert found["frozen"]["flops"] == 4 * cost["tokens"] * weights
        lora = 6 * cost["tokens"] * 128 * 28 * (7 * hidden + 2 * (hidden + keys) + 3 * ffn)
        assert found["lora"]["flops"] == found["frozen"]["flops"] + lora
        assert found["furina"]["added_flops"] > found["lora"]["added_flops"] > 0
    assert scaling_points.BACKBONES["Qwen2-7B"].shapes(1)["gate", "up"] == (3584, 18944)


def test_tables_and_figure_come_from_the_json(
    report: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    def made(report: dict[str, Any]) -> dict[str, bytes]:
        write(tmp_path / "scaling", report, scaling_page.page(report))
        return {end: (tmp_path / f"scaling.{end}").read_bytes() for end in ("md", "svg")}

    assert made(report) == {end: (folder / f"scaling.{end}").read_bytes() for end in ("md", "svg")}
    changed = copy.deepcopy(report)
    for found in changed["points"][0]["variants"].values():
        found |= {"seconds": 12.345, "ratio_to_lora": 6.78, "peak_bytes": 2**30}
    for point in changed["points"][1:]:
        for found in point["variants"].values():
            found["peak_bytes"] = 2**20  # as on a CUDA device
    tables, figure = made(changed).values()
    row = next(line for line in tables.decode().splitlines() if line.startswith("| 1 |"))
    assert all(text in row for text in ("| 12,345 |", "| 6.78 |", "| 1,024 |", "| – |"))
    assert figure != (folder / "scaling.svg").read_bytes()
