"""Wrong commands, options, names and paths are told before torch, which takes seconds."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from safetensors.numpy import save_file

from furina.adapters import methods
from furina.cli.commands import COMMANDS
from furina.cli.parsing import _field_docstrings
from furina.cli.scoring import Report
from furina.errors import FurinaError
from furina.model.config_file import CONFIG_FILE, TENSOR_FILE, config_checksum
from furina.options.known import ATTENTIONS, COMPILERS
from furina.options.registry import _run, _without_torch, registry

ROOT = Path(__file__).parents[2]
READ = {
    "merge": "out",
    "export": "out",
    "evaluate --task arc_easy --adapter-path": "",
    "latency --adapter-path": "",
    "analyse --task arc_easy --out x.json": "",
}
"""Commands that read an adapter, before and after its folder."""
WRONG = {
    "evalute": "Did you mean 'evaluate'?",
    "--jsno": "name a command first",
    **{f"{name} --optoin 1": "has no option --optoin" for name in COMMANDS},
    "assets smollm": "There is no asset 'smollm'",
    "assets --list smollm": "There is no asset 'smollm'",
    "data shw": "action cannot be 'shw'. Did you mean 'show'?",
    "data show arc_esy": "Did you mean 'arc_easy'?",
    "data show arc_easy --index x": "--index must be a whole number, not 'x'",
    "data show arc_easy --split tset": "--split cannot be 'tset'. Did you mean 'test'?",
    "data audit --data-dir nowhere": "no data folder nowhere: correct --data-dir",
    "methods lora": "unrecognized arguments: lora",
    "fit --method furnia": "Did you mean 'furina'?",
    "fit --method base": "method base has nothing to fit",
    "fit --method lora --adapter.rnak 8": "Did you mean '--adapter.rank'?",
    "fit --adapter.rank many": "--adapter.rank must be a whole number, not 'many'",
    "fit --adapter.start zero": "--adapter.start cannot be 'zero'",
    "fit --dtype int8": "--dtype cannot be 'int8'",
    "fit --steps 3 --epochs 2": "steps=3 and epochs=2: give one of them",
    "fit --steps 0": "steps=0 must be at least 1",
    "fit --task arc_esy": "Did you mean 'arc_easy'?",
    "fit --protocol txt": "Did you mean 'text'?",
    "fit --config nowhere.yaml": "nowhere.yaml: no such file or folder",
    "fit --backbone ./nowhere": "./nowhere is no model folder",
    "fit --backbone smollm2-135m-instuct": "Did you mean 'smollm2-135m-instruct'?",
    "fit --backbone tiny-llama --data-dir nowhere": "no data folder nowhere: correct --data-dir",
    "fit --backbone nope": "'nope' is no name of a model on the hub",
    "fit --backbone tiny-lama": "Did you mean 'tiny-llama'?",
    "fit --backbone org/": "org/ is no model folder: it is not there",
    "fit --backbone model --targets [q_prj]": "matches no module of model. Did you mean 'q_proj'?",
    "fit --attention spda": "attention='spda' is not known to transformers. Did you mean 'sdpa'?",
    "fit --compile inductr": "compile='inductr' is not known to torch. Did you mean 'inductor'?",
    "fit --dtype float16": "dtype=float16 loses small gradients",
    "fit --steps 3 --warmup-steps 4": "warmup_steps=4 is more than the steps=3 of the run",
    "fit --run-dir README.md/x --backbone tiny-llama": "README.md is a file, not a folder",
    "evaluate --task arc_esy": "Did you mean 'arc_easy'?",
    "evaluate --task arc_easy --protocol txt": "Did you mean 'text'?",
    "evaluate --task arc_easy --adapter-path nowhere": "nowhere is not a furina adapter folder",
    "evaluate --task arc_easy --backbone ./nowhere": "./nowhere is no model folder",
    "evaluate --task arc_easy --size 0": "--size must be a whole number of at least 1",
    "evaluate --task arc_easy --output README.md/x": "README.md is a file",
    "evaluate --task arc_easy --backbone tiny-llama --data-dir nowhere": "no data folder nowhere",
    "evaluate --task arc_easy --backbone adapter": "is a furina adapter folder and no backbone",
    "evaluate --task arc_easy --seed 3": "--seed has no effect without --size",
    "evaluate --task gsm8k --protocol cot --engine lm_eval": "--engine has no effect",
    "evaluate --task arc_easy --execute-code": "--execute-code has no effect with protocol text",
    "evaluate --task humaneval --protocol code": "say --execute-code",
    "merge nowhere out": "nowhere is not a furina adapter folder",
    "merge adapter README.md": "README.md exists already",
    "merge adapter README.md/x": "README.md is a file",
    "merge adapter out --backbone ./nowhere": "./nowhere is no model folder",
    "export nowhere out": "nowhere is not a furina adapter folder",
    "export adapter out --format pefd": "Did you mean 'peft'?",
    "combine nowhere adapter out": "nowhere is not a furina adapter folder",
    "combine adapter adapter out --weights 1": "--weights needs 2 numbers",
    "combine adapter adapter README.md/x": "README.md is a file",
    "combine adapter adapter out --power 3": "--power has no effect without --method from",
    "latency --adapter-path nowhere": "nowhere is not a furina adapter folder",
    "latency --backbone nope": "'nope' is no name of a model on the hub",
    **{
        f"{words} damaged {more}": "has missing, unknown or mistyped keys ['modules']"
        for words, more in READ.items()
    },
    **{f"{words} misspelt {more}": "has no option 'rnk'" for words, more in READ.items()},
    **{f"{words} bare {more}": "bare has no furina_adapter" for words, more in READ.items()},
    **{f"{words} nameless {more}": "name it with --backbone" for words, more in READ.items()},
    **{f"{words} gone {more}": "was trained on ./away" for words, more in READ.items()},
    "combine adapter nameless out": "nameless does not say which backbone",
    "combine adapter gone out": "The adapters name several backbones",
    "latency --rounds 0": "--rounds must be a whole number of at least 1, not '0'",
    "latency --rounds many": "--rounds must be a whole number of at least 1, not 'many'",
    "latency --new-tokens 1": "time 2 or more",
    "latency --backbone ./nowhere": "./nowhere is no model folder",
    "analyse nowhere --task arc_easy --out x.json": "nowhere is not a furina adapter folder",
    "analyse adapter --task arc_esy --out x.json": "Did you mean 'arc_easy'?",
    "analyse adapter --task arc_easy --out README.md/x": "README.md is a file",
    "report --results nowhere": "There is no folder nowhere",
    "report --results adapter": "There are no records in adapter",
    "report --results mine --readme README.md --suite man": "holds no suite 'man'. Known: own",
    "report --results mine --metric acc": "No record holds a metric 'acc'",
    "report --results mine --suite main": "--suite main has no effect",
    "report --results mine --readme nowhere.md": "nowhere.md does not exist",
    "report --results mine --check --metric acc": "leave out --metric",
    "run man": "Did you mean 'main'?",
    "run main --scale huge": "--scale cannot be 'huge'",
    "run main --rows furna": "Did you mean 'furina'?",
    "run main --tasks boolk": "Did you mean 'boolq'?",
    "run main --seeds 0": "--seeds 0 must be at least 1",
    "run main --jobs 0": "--jobs 0 must be at least 1",
    "run main --dry-run --device h201": "Did you mean 'h200'?",
    "run main --results README.md/x": "README.md is a file",
    "fit --adapter.rank 0": "furina: rank=0 must be at least 1",
    "fit --adapter.top-k 9": "top_k=9 must be smaller than the 7 self-routed experts",
    "fit --method flylora --adapter.active-rank 99": "active_rank=99 must be between 1 and rank=32",
    "run bounds": "Method lora: rank must be a whole number, not 'many'",
    "run elsewhere": "'nope' is no name of a model on the hub",
    "run elsewhere --dry-run": "'nope' is no name of a model on the hub",
    "run wrong": "Method lora has no option 'rnk'. Did you mean 'rank'?",
}
ADAPTER = {
    "format": "furina-adapter",
    "version": 2,
    "method": "lora",
    "options": {},
    "targets": [],
    "modules": {},
    "backbone": {"name": "tiny-llama"},
    "also_trained": [],
    "tensors_sha256": "",
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "bare": {},
    "nameless": {"backbone": {}},
    "gone": {"backbone": {"name": "./away"}},
    "damaged": {"modules": []},
    "misspelt": {"options": {"rnk": 3}},
}
"""Folders of adapters, and what of their config is another."""
SUITES = {
    "wrong": "adapter: {rnk: 3}",
    "bounds": "adapter: {rank: many}",
    "elsewhere": "backbone: nope",
}
"""Suites of one row, and a line of its file."""
PROGRAM = """
import contextlib, io, json, shlex, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "lightning", "lm_eval", "datasets",
                                      "pandas", "scipy", "matplotlib"):
            raise AssertionError(f"{name} is imported")

sys.meta_path.insert(0, Refused())
from furina.cli import main

said = {}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as stream:
        said[shlex.join(words)] = main(words), stream.getvalue()
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Run every wrong command in one process that cannot import torch; return status and words."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "README.md").write_text("mine")
    for name, change in ADAPTERS.items():
        config = ADAPTER | change
        (folder / name).mkdir()
        text = json.dumps({**config, "sha256": config_checksum(config)})
        (folder / name / CONFIG_FILE).write_text(text)
        (folder / name / TENSOR_FILE).touch()
    (folder / "bare" / TENSOR_FILE).unlink()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    save_file({"layers.0.q_proj.weight": np.ones(1)}, folder / "model" / "model.safetensors")
    (folder / "mine" / "own").mkdir(parents=True)
    (folder / "mine" / "own" / "record.json").write_text("{}")
    for name, line in SUITES.items():
        suite = folder / "experiments" / name
        suite.mkdir(parents=True)
        (suite / "defaults.yaml").write_text("steps: 3\n")
        (suite / "lora.yaml").write_text(f"method: lora\n{line}\n")
    calls = json.dumps([shlex.split(words) for words in WRONG])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, calls],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "FURINA_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_call_is_one_sentence_and_imports_nothing_heavy(
    words: str, said: dict[str, tuple[int, str]]
) -> None:
    status, message = said[shlex.join(shlex.split(words))]
    assert status == 2 and WRONG[words] in message, message
    assert message.startswith("error: ") and message.count("\n") == 1


def test_every_command_is_among_them() -> None:
    assert {words.split()[0] for words in WRONG} > set(COMMANDS)


@pytest.mark.parametrize("method", methods())
def test_without_torch_a_method_has_the_options_that_it_has_with_it(method: str) -> None:
    quick = without_torch().methods()
    assert quick[method] is not methods()[method]
    assert quick.keys() == methods().keys()
    facts = [
        (get_type_hints(config), config().to_dict(), _field_docstrings(config))
        for config in (quick[method], methods()[method])
    ]
    assert facts[0] == facts[1]


NEEDS_TORCH = """
from dataclasses import dataclass
import torch
from furina.adapters.base import register
from furina.adapters.lora import LoRAConfig

@register("wide")
@dataclass(frozen=True)
class WideConfig(LoRAConfig):
    {}
"""


@pytest.mark.parametrize(
    "needs",
    [
        "size: int = torch.iinfo(torch.int8).max",
        "def __post_init__(self): self.require(torch.is_tensor(torch.ones(1)), 'dropout', 'x')",
    ],
)
def test_a_config_that_needs_torch_is_asked_with_it(
    needs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "lora", "mergeable", "registry"):
        shutil.copy(ROOT / "furina" / "adapters" / f"{name}.py", tmp_path)
    monkeypatch.setattr("furina.options.registry._FOLDER", tmp_path)
    assert [*without_torch().methods()] == ["lora"]
    (tmp_path / "wide.py").write_text(NEEDS_TORCH.format(needs))
    assert without_torch() is sys.modules["furina.adapters"]


def without_torch() -> Any:
    """Return the registry as a new process without torch has it."""
    for kept in (_run, _without_torch):
        kept.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        return registry()


@pytest.mark.parametrize(
    "line", ["from furina.adapters import base", "import furina.adapters.base"]
)
def test_a_method_that_imports_the_package_itself_is_registered_once(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "lora", "mergeable", "registry"):
        shutil.copy(ROOT / "furina" / "adapters" / f"{name}.py", tmp_path)
    (tmp_path / "mine.py").write_text(line)
    monkeypatch.setattr("furina.options.registry._FOLDER", tmp_path)
    assert without_torch() is sys.modules["furina.adapters"]


def test_a_metric_of_cells_that_are_stored_once_is_known() -> None:
    report = Report(results=ROOT / "results", metric="acc_norm")
    report._look_at_records(None)
    with pytest.raises(FurinaError, match="Did you mean 'acc_norm'"):
        replace(report, metric="acc_nrm")._look_at_records(None)


def test_known_names_are_the_libraries_own() -> None:
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    names = ALL_ATTENTION_FUNCTIONS._global_mapping
    own = {name for name in names if "|" not in name and not name.startswith("furina")}
    assert {*own, "eager"} == {*ATTENTIONS}
    made_to_fail = re.compile("TESTING_ONLY|minifier")
    backends = torch.compiler.list_backends(exclude_tags=())
    assert {name for name in backends if not made_to_fail.search(name)} <= {*COMPILERS}
