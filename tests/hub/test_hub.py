"""What most people run first: backbone, tokenizer and rows from the hub, broken and refused too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from furina.backbones.load import backbone_hash, load_backbone, load_tokenizer
from furina.data.tasks import tasks
from furina.records.cells import suite_cells
from tests.experiment.helpers import SMALL
from tests.hub.benchmarks import RIGHT, ROWS, SUBJECTS, says
from tests.hub.conftest import LARGE, MODEL, Call
from tests.hub.server import REFUSALS, TOKEN, Hub
from tests.suites.helpers import lora, write_suite

pytestmark = pytest.mark.xdist_group("hub")  # one process that has the hub is enough

WEIGHTS = "model.safetensors"
BLOCK = 10 * 1024 * 1024


def _same(*splits: str) -> dict[str, str]:
    return {split: split for split in splits}


ALL = _same("train", "validation", "test")
UNTESTED = {"train": "train", "test": "validation"}
"""Of sets whose public test split has no labels."""
PUBLIC: dict[str, tuple[str, dict[str, str]]] = {
    "aqua": ("raw", ALL),
    "arc_challenge": ("ARC-Challenge", ALL),
    "arc_easy": ("ARC-Easy", ALL),
    "boolq": ("default", UNTESTED),
    "commonsense_qa": ("default", UNTESTED),
    "gsm8k": ("main", _same("train", "test")),
    "hellaswag": ("default", UNTESTED),
    "mmlu": ("all", {"train": "dev", "validation": "validation", "test": "test"}),
    "openbookqa": ("main", ALL),
    "piqa": ("default", UNTESTED),
    "social_iqa": ("default", UNTESTED),
    "winogrande": ("winogrande_xl", UNTESTED),
}
"""Configuration, and the public split of each of ours."""
OTHERS: dict[tuple[str, str], list[tuple[str, str]]] = {
    ("humaneval", "train"): [("default", "train")],
    ("humaneval", "test"): [("openai_humaneval", "test")],
    ("math", "train"): [(subject, "train") for subject in SUBJECTS],
    ("math", "test"): [(subject, "test") for subject in SUBJECTS],
    ("math500", "train"): [(subject, "test") for subject in SUBJECTS],
    ("math500", "test"): [("default", "test")],
    ("multiarith", "test"): [("default", "train"), ("default", "test")],
    ("svamp", "test"): [("default", "train"), ("default", "test")],
}
PLACES = OTHERS | {
    (task, ours): [(configuration, public)]
    for task, (configuration, splits) in PUBLIC.items()
    for ours, public in splits.items()
}


def _right(task: str, split: str, number: int) -> str:
    if task in ("aqua", "boolq"):
        return "ABCDE"[number % 5] if task == "aqua" else ("no", "yes")[number % 2]
    if (task, split) == ("humaneval", "test"):
        return f"    return {number}\n"
    return RIGHT if tasks()[task].kind == "choice" else str(number)


def test_a_backbone_and_its_tokenizer_load_by_their_name_on_the_hub(hub: Hub, call: Call) -> None:
    assert call("backbone", MODEL)["value"] == backbone_hash(load_backbone("tiny-llama", "float32"))
    text = "Question: the end?"
    assert call("tokens", MODEL, text)["value"] == load_tokenizer("tiny-llama").encode(text)


def test_every_task_reads_the_rows_of_its_public_repository(hub: Hub, call: Call) -> None:
    assert PLACES.keys() == {(task.name, split) for task in tasks().values() for split in task.hub}
    for (task, split), places in PLACES.items():
        answer = call("items", task, split)
        rows = [(*place, number) for place in places for number in range(ROWS)]
        assert len(answer["value"]) == len(rows)
        for (asked, right), row in zip(answer["value"], rows, strict=True):
            assert says(*row) in asked and right == _right(task, split, row[-1])
            assert task == "humaneval" or asked == asked.strip()


def _done(answer: dict[str, Any]) -> bool:
    """Return whether a command succeeded, and show what it said if not."""
    print(answer["value"]["err"])
    return bool(answer["value"]["status"] == 0)


def test_fit_evaluate_and_run_need_only_the_hub(hub: Hub, call: Call, tmp_path: Path) -> None:
    small = {**SMALL, "backbone": MODEL, "source": "hub", "steps": 2, "test_size": 4}
    rows = {"base": {"method": "base"}, "lora": lora(adapter={"rank": 2})}
    suite = str(write_suite(tmp_path / "own", small, **rows))
    planned = call("command", "run", suite, "--dry-run")["value"]
    assert planned["status"] == 2
    assert f"`hf download {MODEL} config.json` fetches it" in planned["err"]
    where = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert _done(call("command", "run", suite, *where))
    records = [cell.name for cell in suite_cells(tmp_path / "results" / "own")]
    assert records == ["base--arc_easy--seed0", "lora--arc_easy--seed0"]
    assert _done(call("command", "run", suite, "--dry-run"))

    shared = ["--backbone", MODEL, "--source", "hub", "--task", "openbookqa", "--dtype", "float32"]
    run = str(tmp_path / "run")
    options = ["--method", "lora", "--steps", "2", "--batch-size", "4", "--validation-size", "4"]
    options += ["--warmup-steps", "1"]
    assert _done(call("command", "fit", *shared, *options, "--run-dir", run))
    scored = ["--adapter-path", f"{run}/adapter", "--output", str(tmp_path / "scores")]
    assert _done(call("command", "evaluate", *shared, *scored))
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert str(ROWS) in json.dumps(scores)


@pytest.mark.parametrize("how", ["broken", "silent"])
def test_a_download_goes_on_where_the_connection_broke(
    hub: Hub, call: Call, tmp_path: Path, how: str
) -> None:
    files = hub.repositories[LARGE]
    weights = max(files, key=lambda path: len(files[path]))
    hub.cut[weights], hub.silent = [2 * BLOCK + 5000], {weights} if how == "silent" else set()
    found = call("backbone", LARGE)["value"]
    first, *ranges = [request.range for request in hub.asked("GET", weights)]
    assert first is None and ranges[0] == f"bytes={2 * BLOCK}-"
    for path, data in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    assert found == backbone_hash(load_backbone(str(tmp_path), "float32"))


def test_a_download_that_never_ends_is_one_sentence(hub: Hub, call: Call) -> None:
    table = "data/validation-00000-of-00001.parquet"
    hub.cut = {path: [0] * 20 for path in (WEIGHTS, "tokenizer.json", table)}
    for words in (("backbone", MODEL), ("tokens", MODEL, ""), ("items", "boolq", "test")):
        said = call(*words)["error"]
        assert re.match(rf"{hub.url} cannot be reached or stopped answering \(\w+\): check", said)


NOT_THERE = "There is no {kind} {name} at {url}, or it is private: check the name, or log in with"
SENTENCES = {
    "gated": "{name} is gated: accept its licence at {page}, and log in with `hf auth login` or",
    "unlisted": "{name} is gated, and your token does not open it: accept its licence at {page}",
    "private": NOT_THERE,
    "missing": NOT_THERE,
    "revoked": "{url} refuses your token: log in anew with `hf auth login`, or correct or unset",
    "forbidden": "Your token does not open {page}: give another one with `hf auth login` or",
    "disabled": "The {kind} {name} is disabled at {url}: choose another",
    "busy": "{url} has had too many requests from you: wait some minutes, or log in with",
    "failing": "{url} answered 503 when asked for the {kind} {name}: try again later",
}


@pytest.mark.parametrize("why", SENTENCES)
def test_what_the_hub_refuses_says_in_one_sentence_what_to_do(
    hub: Hub, call: Call, why: str
) -> None:
    """And soon: a hub that fails is asked three times, one that refuses once."""
    name = "Rowan/hellaswag"
    hub.refusals = {name: REFUSALS[why], f"datasets/{name}": REFUSALS[why]}
    for kind, page, words in (
        ("model", f"{hub.url}/{name}", ("fit", "--backbone", name, "--task", "hellaswag")),
        ("data set", f"{hub.url}/datasets/{name}", ("data", "audit", "hellaswag", "hellaswag")),
    ):
        hub.requests.clear()
        answer = call("command", *words, "--source", "hub")["value"]
        sentence = SENTENCES[why].format(name=name, page=page, url=hub.url, kind=kind)
        (said,) = (line for line in answer["err"].splitlines() if not line.startswith("dtype auto"))
        assert said.startswith(f"error: {sentence}"), answer
        assert answer["status"] == 2
        assert "Known:" not in said and "huggingface.co" not in said
        assert len(hub.requests) == (3 if why == "failing" else 1)


def test_a_gated_repository_opens_to_a_token(hub: Hub, call: Call) -> None:
    hub.refusals[MODEL] = REFUSALS["gated"]
    assert "is gated" in call("backbone", MODEL)["error"]
    call("setenv", "HF_TOKEN", TOKEN)
    assert "value" in call("backbone", MODEL)


def test_a_misspelt_name_is_told_of_a_known_one_only_if_that_is_near(hub: Hub, call: Call) -> None:
    said = call("backbone", "org/SmolLM2-135M-Instruct")["error"]
    assert said.endswith("Did you mean 'smollm2-135m-instruct'?")
    assert "Did you mean" not in call("backbone", "meta-llama/Llama-9")["error"]
    assert "is no name of a model on the hub" in call("backbone", "not a/name")["error"]


def test_what_a_repository_lacks_is_not_laid_to_the_hub(hub: Hub, call: Call) -> None:
    hub.repositories["org/bare"] = {"README.md": b""}
    said = f"org/bare holds no model that transformers loads: at {hub.url} it has no config.json."
    assert call("backbone", "org/bare")["error"] == f"{said} There is no folder org/bare either."
    whole = hub.repositories[MODEL]
    hub.repositories["org/bare"] = {path: whole[path] for path in whole if path != WEIGHTS}
    assert re.search(rf"org/bare.*{WEIGHTS}", call("backbone", "org/bare")["error"])


def test_without_a_hub_the_cache_serves_and_says_so(hub: Hub, call: Call) -> None:
    first = call("backbone", MODEL)["value"], call("items", "arc_easy", "test")["value"]
    hub.stop()
    try:
        again = call("backbone", MODEL), call("items", "arc_easy", "test")
        cold = call("backbone", "org/other")["error"], call("items", "boolq", "test")["error"]
    finally:
        hub.start()
    assert (again[0]["value"], again[1]["value"]) == first
    for answer in again:
        (warned,) = answer["warned"]
        assert "cannot be reached" in warned and "cache" in warned
    for said in cold:
        assert said.startswith(f"{hub.url} cannot be reached or stopped answering (ConnectError)")
    assert "run `furina assets`, or give --data-dir" in cold[1]


def test_offline_nothing_is_asked_of_the_hub(hub: Hub, call: Call) -> None:
    """And of a repository the cache need not hold what nobody reads."""
    first = call("backbone", LARGE)["value"], call("items", "arc_easy", "test")["value"]
    hub.requests.clear()
    call("setenv", "FURINA_OFFLINE", "1")
    assert call("backbone", LARGE) == {"value": first[0], "warned": []}
    assert call("items", "arc_easy", "test") == {"value": first[1], "warned": []}
    assert "may lack files" in call("tokens", LARGE, "")["error"]
    for said in (call("backbone", "org/other")["error"], call("items", "mmlu", "test")["error"]):
        assert "is not in the cache, and offline it cannot be fetched" in said
    assert hub.requests == []


def test_damaged_rows_are_one_sentence(hub: Hub, call: Call) -> None:
    whole = hub.repositories["datasets/lighteval/siqa"]
    damaged = {path: data if path == "README.md" else data[:99] for path, data in whole.items()}
    hub.repositories["datasets/lighteval/siqa"] = damaged
    said = call("items", "social_iqa", "train")["error"]
    assert said.startswith("Cannot read lighteval/siqa from the hub (")
