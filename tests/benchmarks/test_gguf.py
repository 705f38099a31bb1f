"""benchmarks/serving/gguf_engine.py: what it asks of the engine, and how it counts the answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.serving import gguf_engine
from furina.assets import locate
from furina.errors import AssetError, FurinaError
from tests.benchmarks import helpers
from tests.benchmarks.helpers import printed, written
from tests.experiment.helpers import write_data

SMALL = ["--backbone", "tiny-llama", "--dtypes", "float32", "--rank", "8", "--experts", "4"]
SMALL += ["--prompts", "2", "--new-tokens", "3", "--threads", "1"]
WORKER = """
import json, pathlib, sys
command, *words = sys.argv[1:]
if command == "convert":
    folder, file, kind = words
    assert (pathlib.Path(folder) / "model.safetensors").exists() and kind == "f32"
    sys.exit(pathlib.Path(file).write_text("GGUF") != 4)
assert pathlib.Path(words[0]).read_text() == "GGUF" and words[1:] == ["f32", "1"]
asked = json.load(sys.stdin)
new = asked["new_tokens"]
own = [text[-new:] for text in asked["texts"]]
assert [text[:-new] for text in asked["texts"]] == asked["prompts"]
print("a line of the engine's own")
forced = [[[token, -1.0] for token in tokens] for tokens in own]
forced[0][1][0] += 1
print(json.dumps({"generated": [own[0], own[1][::-1]], "forced": forced, "versions": {"x": "1"}}))
"""


@pytest.fixture(scope="module", autouse=True)
def questions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Made-up questions to ask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FURINA_DATA_DIR", write_data(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose engine says what transformers says, but for one token."""
    monkeypatch.setattr(gguf_engine, "WORKER", tmp_path / "worker.py")
    return helpers.environment(tmp_path, WORKER)


def test_the_script_compares_the_same_tokens_and_writes_what_it_prints(
    environment, tmp_path, capsys
):
    results = tmp_path / "results"
    gguf_engine.main([*SMALL, "--environment", str(environment), "--results", str(results)])
    report = printed(capsys)
    (case,) = report["cases"]
    assert (case["prompts"], case["positions"], case["tokens_changed"]) == (2, 6, 1)
    assert case["continuations_changed"] <= 1 and case["widest_gap"] > 0
    assert case["unmerged_changed"] == 0
    assert report["ratios"] == {"tokens/furina/float32/gguf_over_merging": 3.0}
    assert report["environment"]["engine"] == {"x": "1"}
    assert written(results / "gguf") == (report, gguf_engine.page(report).markdown("gguf"))


def test_changed_tokens_are_counted_with_how_near_they_were():
    table = torch.tensor([[-0.5, -1.0, -3.0], [-2.0, -0.25, -4.0]])
    answers = {"generated": [[0, 1], [1, 1]], "forced": [[[0, -0.625], [0, -2.0]]]}
    found = gguf_engine.compare([[0, 1], [0, 1]], [table], answers)
    assert found == {
        "prompts": 2,
        "continuations_changed": 1,
        "positions": 2,
        "tokens_changed": 1,
        "difference": 0.125,
        "widest_gap": 1.75,
    }


def test_the_next_tokens_are_those_of_the_texts_last_beginnings():
    """Log-probabilities at row i are of the token that follows text[:-new + i]."""
    model = gguf_engine.furina.load_backbone("tiny-llama", "float32")
    prompt = [5, 6, 7, 8]
    more = gguf_engine.generate(model, prompt, 3)
    (table,) = gguf_engine.forced(model, [prompt + more], 3)
    assert table.shape == (3, 384) and table.argmax(-1).tolist() == more
    assert table.exp().sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_a_missing_environment_is_one_sentence(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        gguf_engine.main([*SMALL, "--environment", str(tmp_path / "absent")])
    assert str(stopped.value) == "error: llama.cpp is not installed: run `make gguf`."


def test_the_workers_last_word_is_the_reason(environment):
    Path(environment / "worker.py").write_text("import sys; sys.exit('no such tensor')")
    with pytest.raises(FurinaError, match=r"convert failed: no such tensor$"):
        gguf_engine.engine(environment, "convert", "a", "b", "f32")


def test_a_table_is_made_from_the_json_alone(environment, capsys):
    gguf_engine.main([*SMALL, "--environment", str(environment)])
    report = printed(capsys)
    report["cases"][0] |= {"positions": 200, "tokens_changed": 3, "unmerged_changed": 1}
    table = gguf_engine.page(report).markdown("gguf")
    assert "| 200 | 1.50 \\[0.51, 4.32\\] | 0.50 \\[0.09, 2.78\\] |" in table


@pytest.mark.parametrize("word", ["--prompts", "--new-tokens", "--rank"])
def test_a_wrong_number_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        gguf_engine.parse([word, "0"])
    assert f"{word} must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_llama_cpp_continues_as_transformers_does_in_float32(capsys):
    try:
        locate("smollm2-135m-instruct")
    except AssetError as error:
        if "FURINA_REQUIRE_ASSETS" in os.environ:
            raise
        pytest.skip(str(error))
    if not (gguf_engine.ENVIRONMENT / ".installed").exists():
        give_up = pytest.fail if "FURINA_REQUIRE_ASSETS" in os.environ else pytest.skip
        give_up("llama.cpp is not installed: run `make gguf`")
    few = ["--dtypes", "float32", "--prompts", "4", "--new-tokens", "12"]
    gguf_engine.main(few)
    (case,) = printed(capsys)["cases"]
    assert case["tokens_changed"] == case["continuations_changed"] == 0
    assert case["difference"] < 1e-3
