"""An adapter folder says which backbone it belongs to: no command asks for it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import furina
from furina import cli
from furina.assets import ASSETS
from furina.cli.commands import COMMANDS
from furina.errors import ConfigurationError
from tests.experiment.helpers import write_data
from tests.helpers import perturb, small

ASSET = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, a bf16 backbone and two adapters of it."""
    folder = tmp_path_factory.mktemp("made")
    write_data(folder / "data", splits=("test",))
    furina.load_backbone("tiny-llama", "bfloat16").save_pretrained(folder / "backbone")
    furina.load_tokenizer("tiny-llama").save_pretrained(folder / "backbone")
    for method in ("lora", "furina"):
        model = furina.load_backbone(str(folder / "backbone"), "float32")
        furina.adapt(model, small(method), seed=0)
        perturb(model)
        furina.save(model, folder / method)
    return folder


def words_of(name: str, made: Path, out: Path) -> list[str]:
    asked = ["--task", "arc_easy", "--data-dir", str(made / "data")]
    quick = ["--rounds", "1", "--warmup", "0", "--prompt-tokens", "3", "--new-tokens", "2"]
    adapter = str(made / "furina")
    return [name] + {
        "merge": [adapter, str(out)],
        "export": [adapter, str(out)],
        "combine": [adapter, str(made / "lora"), str(out)],
        "evaluate": ["--adapter-path", adapter, "--size", "4", *asked],
        "latency": ["--adapter-path", adapter, *quick],
        "analyse": [adapter, "--items", "4", "--out", str(out), *asked],
    }[name]


READERS = [
    name
    for name in COMMANDS
    if any(action.dest.startswith("adapter_") for action in COMMANDS[name].parser([])._actions)
]


@pytest.mark.parametrize("name", READERS)
def test_the_adapters_own_backbone_is_taken_and_said(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words_of(name, made, tmp_path / "out")) == 0
    shown = capsys.readouterr().out
    assert f"backbone {made / 'backbone'}, which the adapter was trained on\n" in shown


@pytest.mark.parametrize("name", READERS)
def test_a_backbone_that_is_named_is_not_said(
    name: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words_of(name, made, tmp_path / "out"), "--backbone", str(made / "backbone")]
    assert cli.main(words) == 0
    assert "which the adapter was trained on" not in capsys.readouterr().out


def renamed(made: Path, folder: Path, name: str) -> Path:
    """Return an adapter of the same backbone that calls it otherwise."""
    model = furina.load_backbone(str(made / "backbone"), "float32")
    model.config._name_or_path = model.backbone_name = name
    furina.adapt(model, small("furina"), seed=0)
    furina.save(model, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "does not say which backbone it was trained on: name it with --backbone"),
        ("/gone/away", "was trained on /gone/away. /gone/away is no model folder"),
    ],
)
def test_a_backbone_that_is_not_known_or_gone_is_one_sentence(
    name: str, said: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = renamed(made, tmp_path / "adapter", name)
    assert cli.main(["merge", str(adapter), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1 and "--backbone" in message
    assert not (tmp_path / "out").exists()


def test_a_place_in_another_machines_cache_is_the_fetched_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = ASSETS[ASSET].cached_name
    adapter = renamed(made, tmp_path / "adapter", f"/home/other/.cache/furina/{cached}")
    monkeypatch.setenv("FURINA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / cached).symlink_to(made / "backbone")
    assert cli.main(["merge", str(adapter), str(tmp_path / "out")]) == 0
    assert f"backbone {ASSET}, which the adapter was trained on" in capsys.readouterr().out


def test_adapters_of_two_backbones_are_not_guessed_between(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = renamed(made, tmp_path / "adapter", "org/other")
    assert cli.main(["combine", str(made / "lora"), str(other), str(tmp_path / "out")]) == 2
    assert "name several backbones" in capsys.readouterr().err


def test_what_a_killed_evaluation_left_is_gone_after_the_next(made: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.half").mkdir()
    words = [*words_of("evaluate", made, tmp_path), "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("words", [["merge"], ["export", "--format", "merged"]])
def test_what_was_trained_in_float32_is_written_in_the_checkpoints_dtype_and_that_is_said(
    words: list[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main([*words, str(made / "furina"), str(out)]) == 0
    assert f"{out}: a plain Hugging Face folder in bfloat16\n" in capsys.readouterr().out
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    wide = tmp_path / "wide"
    assert cli.main([*words, str(made / "furina"), str(wide), "--dtype", "float32"]) == 0
    assert f"{wide}: a plain Hugging Face folder in float32\n" in capsys.readouterr().out
    assert {t.dtype for t in load_file(wide / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("name", ["evaluate", "latency", "analyse"])
def test_what_computes_takes_the_best_device(
    name: str,
    made: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, device: str, **__: object) -> None:
        raise ConfigurationError(f"loaded onto {device}.")

    monkeypatch.setattr("furina.kernels.processor.best_device", lambda: "the accelerator")
    monkeypatch.setattr("furina.backbones.load.load_backbone", refuse)
    words = [*words_of(name, made, tmp_path / "out"), "--dtype", "float32"]
    assert cli.main(words) == 2
    assert "loaded onto the accelerator" in capsys.readouterr().err
