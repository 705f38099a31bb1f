"""The README's example and commands run as printed, on a tiny model in the asset's place."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from furina.assets import ASSETS
from furina.backbones.load import load_backbone, load_tokenizer
from furina.cli import main
from furina.data.protocols import protocols
from furina.reporting.pages.generate import BEGIN, END

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL = "smollm2-135m-instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[str]:
    lines = (
        line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()
    )
    return [line for line in lines if line.startswith(f"{program} ")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache whose backbone is a tiny random one, and a data folder of made-up questions."""
    cache, data = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("data")
    folder = cache / ASSETS[MODEL].cached_name
    load_backbone("tiny-llama").save_pretrained(folder)
    load_tokenizer("tiny-llama").save_pretrained(folder)
    (data / "arc_easy").mkdir()
    for split, size in {"train": 300, "validation": 20, "test": 20}.items():
        rows = (json.dumps(question(split, number)) for number in range(size))
        path = data / "arc_easy" / f"{split}.jsonl.gz"
        path.write_bytes(gzip.compress("\n".join(rows).encode()))
    places = {"FURINA_CACHE_DIR": str(cache), "FURINA_DATA_DIR": str(data)}
    return {**os.environ, **places, "FURINA_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def question(split: str, number: int) -> dict[str, object]:
    return {
        "id": f"{split}-{number}",
        "question": f"Which number comes after {number} in the {split} list?",
        "choices": {"text": [str(number + i) for i in range(4)], "label": list("ABCD")},
        "answerKey": "B",
    }


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_python_example_runs_and_leaves_what_it_says(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (example,) = blocks("python")
    run([sys.executable, "-c", example], tmp_path, environment)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "furina_config.json",
        "furina_adapter.safetensors",
    }
    plain = "from transformers import AutoModelForCausalLM as M; M.from_pretrained('merged')"
    run([sys.executable, "-c", plain], tmp_path, environment)


def test_the_python_example_has_ten_lines() -> None:
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10


def test_the_commands_run_in_their_order(
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert {line.split()[1] for line in commands("furina")} > {"fit", "evaluate", "merge", "export"}
    for line in commands("furina"):
        status = main(shlex.split(line)[1:])
        assert status == 0, f"{line}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("line", commands("make"))
def test_the_make_targets_exist(line: str) -> None:
    done = subprocess.run([*line.split(), "-n"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_are_the_first_ones() -> None:
    assert commands("make")[:2] == ["make reproduce", "make test"]


def test_the_block_for_the_generated_table_stands_once_and_in_order() -> None:
    assert README.count(BEGIN) == README.count(END) == 1
    assert README.index(BEGIN) < README.index(END)


def test_no_score_is_typed_by_hand() -> None:
    written = README[: README.index(BEGIN)] + README[README.index(END) :]
    assert re.findall(r"\b0\.\d+\b|\d+(?:\.\d+)? ?%|± ?\d", written) == []


def test_every_protocol_has_its_row_with_its_version() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README, re.MULTILINE))
    expected = {name: str(protocol.version) for name, protocol in protocols().items()}
    assert rows == {**expected, "lm_eval": "lm-eval's"}


@pytest.mark.parametrize("target", re.findall(r"\]\((?!https?://)([^)#]+)\)", README))
def test_a_link_leads_to_a_file(target: str) -> None:
    assert (ROOT / target).exists()
