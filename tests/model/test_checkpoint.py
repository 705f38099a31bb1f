"""An adapter folder is strict both ways: it loads exactly as saved, or says why not."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import signal
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import furina
from furina import storage
from furina.errors import AdapterFileError, ConfigurationError, FurinaError
from furina.model import checkpoint
from furina.model.config_file import CONFIG_FILE, TENSOR_FILE, config_checksum
from furina.model.state import state_of
from tests.helpers import BACKBONES, MERGEABLE, chain, fingerprint, perturb, raw, small, tokens

every_method = pytest.mark.parametrize("method", furina.methods())


def adapted(method: str = "furina", backbone: str = "llama", dtype=torch.float32, **options):
    model = furina.adapt(BACKBONES[backbone](dtype), small(method, **options), seed=0)
    perturb(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "adapter"
    furina.save(adapted(), path)
    return path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of a good adapter folder, to be damaged."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the config, and its checksum with it."""
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text())
    change(config)
    if "sha256" in config:
        config["sha256"] = config_checksum(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors, and their checksum with them."""
    tensors = load_file(folder / TENSOR_FILE)
    with safe_open(folder / TENSOR_FILE, "pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, folder / TENSOR_FILE, metadata)
    digest = storage.sha256_file(folder / TENSOR_FILE)
    edit(folder, lambda config: config.update(tensors_sha256=digest))


def refused(folder: Path, *words: str, model: nn.Module | None = None) -> None:
    """Assert that loading fails in one sentence holding `words`, and changes nothing."""
    model = BACKBONES["llama"]() if model is None else model
    before = fingerprint(model)
    with pytest.raises(AdapterFileError) as caught:
        furina.load(folder, model)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert fingerprint(model) == before


@every_method
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_loaded_adapter_is_the_saved_one_bit_for_bit(method, backbone, dtype, tmp_path) -> None:
    model = adapted(method, backbone, dtype)
    furina.save(model, tmp_path / "a")
    twin = BACKBONES[backbone](dtype)
    assert furina.load(tmp_path / "a", twin) is twin
    assert state_of(twin).config == state_of(model).config
    one, other = (furina.adapter_state_dict(m) for m in (model, twin))
    assert {n: raw(t) for n, t in one.items()} == {n: raw(t) for n, t in other.items()}
    with torch.no_grad():
        assert torch.equal(model(**tokens()).logits, twin(**tokens()).logits)


def test_a_folder_holds_a_config_and_tensors_and_nothing_else(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == sorted([CONFIG_FILE, TENSOR_FILE])
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert (config["format"], config["version"]) == ("furina-adapter", 2)
    assert config["options"] == small("furina").to_dict()
    names = set(load_file(saved / TENSOR_FILE))
    assert names == set(furina.adapter_state_dict(adapted()))


def test_the_subtracted_start_travels_with_the_adapter(tmp_path: Path) -> None:
    model = adapted(start="subtract")
    furina.save(model, tmp_path / "a")
    twin = furina.load(tmp_path / "a", BACKBONES["llama"]())
    with torch.no_grad():
        assert torch.equal(model(**tokens()).logits, twin(**tokens()).logits)


@pytest.mark.parametrize("method", MERGEABLE)
def test_saving_a_merged_model_writes_the_same_bytes(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    furina.save(model, tmp_path / "a")
    furina.merge(model)
    furina.save(model, tmp_path / "b")
    for file in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_saving_and_loading_leave_the_generator_alone(tmp_path: Path) -> None:
    model, before = adapted(), torch.get_rng_state()
    furina.save(model, tmp_path / "a")
    furina.load(tmp_path / "a", BACKBONES["llama"]())
    assert torch.equal(torch.get_rng_state(), before)


def test_an_adapter_loads_into_the_same_backbone_in_another_dtype(tmp_path: Path) -> None:
    furina.save(adapted(dtype=torch.bfloat16), tmp_path / "a")
    model = BACKBONES["llama"](torch.bfloat16).float()
    furina.load(tmp_path / "a", model)
    assert furina.is_adapted(model)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / CONFIG_FILE).unlink(), f"has no {CONFIG_FILE}"),
        (lambda f: (f / TENSOR_FILE).unlink(), f"has no {TENSOR_FILE}"),
        (lambda f: (f / CONFIG_FILE).write_text(""), "is damaged"),
        (lambda f: (f / CONFIG_FILE).write_text("{'a': 1}"), "is damaged"),
        (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), "is damaged"),
        (lambda f: (f / CONFIG_FILE).write_text("[" * 100_000), "is damaged"),
        (lambda f: (f / CONFIG_FILE).write_text("[1, 2]"), "not the config of a furina adapter"),
        (lambda f: (f / CONFIG_FILE).write_text('{"peft_type": "LORA"}'), "not the config of"),
        (lambda f: (f / TENSOR_FILE).write_bytes(b""), "truncated or not a safetensors"),
        (lambda f: (f / TENSOR_FILE).write_bytes(b"garbage" * 100), "truncated or not"),
        (lambda f: (f / TENSOR_FILE).write_bytes(struct.pack("<Q", 2**60)), "truncated or not"),
    ],
)
def test_a_missing_corrupt_or_foreign_file_is_one_sentence(folder: Path, damage, words) -> None:
    damage(folder)
    refused(folder, words)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_tensor_file_is_one_sentence(folder: Path, share: float) -> None:
    data = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(data[: int(share * len(data))])
    refused(folder, "truncated or not a safetensors file")


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not a furina adapter folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is not a furina adapter folder")


def test_an_unreadable_file_is_one_sentence(folder: Path, monkeypatch) -> None:
    def forbidden(*_: object, **__: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "load_file", forbidden)
    refused(folder, "Permission denied")
    monkeypatch.setattr(Path, "read_text", forbidden)
    refused(folder, "Permission denied")


def test_a_pickle_in_place_of_the_tensors_is_never_opened(folder: Path, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(trap),)

    (folder / TENSOR_FILE).write_bytes(pickle.dumps(Trap()))
    refused(folder, "not a safetensors file")
    torch.save(Trap(), folder / TENSOR_FILE)
    refused(folder, "not a safetensors file")
    torch.save(Trap(), folder / "adapter_model.bin")
    assert not trap.exists()


@pytest.mark.parametrize("version", [0, 3, 99, "1", True, None])
def test_another_format_version_is_named(folder: Path, version) -> None:
    edit(folder, lambda config: config.update(version=version))
    refused(folder, f"format version {version!r}", "reads versions 1 and 2")


@pytest.mark.parametrize("key", ["method", "options", "targets", "modules", "backbone"])
@pytest.mark.parametrize("value", [None, 3, "gone"])
def test_a_missing_or_mistyped_key_is_named(folder: Path, key: str, value) -> None:
    if key == "method" and value == "gone":
        value = ["furina"]
    edit(folder, lambda c: c.pop(key) if value == "gone" else c.update({key: value}))
    refused(folder, CONFIG_FILE, key)


def test_an_unknown_key_method_option_or_value_is_named(folder: Path) -> None:
    original = (folder / CONFIG_FILE).read_text()
    changes = (
        (lambda c: c.update(extra=1), ("extra",)),
        (lambda c: c.update(method="furnia"), ("Unknown method 'furnia'", "Did you mean 'furina'")),
        (lambda c: c["options"].update(rnak=3), ("no option 'rnak'", "Did you mean 'rank'")),
        (lambda c: c["options"].update(rank=0), ("rank=0 must be at least 1",)),
        (lambda c: c["options"].update(rank="three"), ("rank",)),
        (lambda c: c["options"].update(rank=None), ("rank",)),
        (lambda c: c["options"].update(activity="loud"), ("activity",)),
    )
    for change, words in changes:
        (folder / CONFIG_FILE).write_text(original)
        edit(folder, change)
        refused(folder, CONFIG_FILE, *words)


def test_contents_that_contradict_the_config_are_refused(folder: Path) -> None:
    original = (folder / CONFIG_FILE).read_text()
    first = "model.layers.0.self_attn.q_proj"
    changes = (
        (lambda c: c["options"].update(rank=4), ("does not fit", "lora_A has shape (24, 24)")),
        (lambda c: c.update(targets=["q_proj"]), ("does not fit",)),
        (lambda c: c.update(targets=["nope"]), ("does not fit", "'nope' matches no module")),
        (lambda c: c.update(targets=[1]), ("does not fit", "targets")),
        (lambda c: c.update(targets=[]), ("does not fit", "targets")),
        (lambda c: c["modules"].pop(first), ("does not fit", "other names or shapes")),
        (lambda c: c.update(modules={}), ("does not fit", "other names or shapes")),
        (lambda c: c["modules"].update({first: 3}), ("another backbone", first)),
        (lambda c: c.update(also_trained=["lm_head.weight"]), ("lacks lm_head.weight",)),
    )
    for change, words in changes:
        (folder / CONFIG_FILE).write_text(original)
        edit(folder, change)
        refused(folder, *words)


def test_other_tensors_than_the_adapters_own_are_refused(folder: Path) -> None:
    originals = {file: file.read_bytes() for file in folder.iterdir()}
    name = "model.layers.1.mlp.up_proj.magnitude"
    changes = (
        (lambda t: t.pop(name), ("missing", name)),
        (lambda t: t.update({"lora_C": torch.zeros(1)}), ("unexpected lora_C",)),
        (lambda t: t.update({name: t[name][:-1].clone()}), (name, "shape")),
        (lambda t: t.update({name: torch.full_like(t[name], torch.nan)}), (name, "NaN")),
        (lambda t: t[name].__setitem__(0, torch.inf), (name, "infinite")),
        (lambda t: t.update({name: t[name].long()}), (name, "integer")),
    )
    for change, words in changes:
        for file, original in originals.items():
            file.write_bytes(original)
        edit_tensors(folder, change)
        refused(folder, *words)


def test_an_adapter_for_another_backbone_is_refused(folder: Path) -> None:
    refused(folder, "is for another backbone (llama)", "shape", model=BACKBONES["qwen2"]())
    refused(folder, "trained on other weights", model=BACKBONES["llama"](seed=1))
    plain = nn.ModuleDict({"q_proj": nn.Linear(2, 2)})
    refused(folder, "is for another backbone (llama)", "no such linear", model=plain)


def test_other_weights_are_accepted_on_request_only(folder: Path) -> None:
    model = BACKBONES["llama"](seed=1)
    assert furina.is_adapted(furina.load(folder, model, check_backbone=False))
    with pytest.raises(AdapterFileError, match="another backbone"):
        furina.load(folder, BACKBONES["qwen2"](), check_backbone=False)


def test_loading_into_an_adapted_model_says_so(folder: Path) -> None:
    model = adapted("lora")
    before = fingerprint(model)
    with pytest.raises(ConfigurationError, match=r"already has a lora adapter: call furina.remove"):
        furina.load(folder, model)
    furina.merge(model)
    with pytest.raises(ConfigurationError, match="already has a lora adapter"):
        furina.load(folder, model)
    furina.unmerge(model)
    assert fingerprint(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_diverged_is_not_saved(value: float, tmp_path: Path) -> None:
    model = adapted()
    name, parameter = list(furina.adapter_parameters(model).items())[3]
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    with pytest.raises(ConfigurationError, match="was not saved") as caught:
        furina.save(model, tmp_path / "a")
    assert name in str(caught.value)
    assert not list(tmp_path.iterdir())


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["save_file", "write_json", "fsync"])
def test_a_full_disk_is_one_sentence_and_leaves_the_old_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    before = {file: file.read_bytes() for file in folder.parent.rglob("*") if file.is_file()}
    monkeypatch.setattr(storage.os if place == "fsync" else checkpoint, place, full)
    for path in (folder, folder.parent / "new"):
        with pytest.raises(FurinaError, match="the disk is full") as caught:
            furina.save(adapted(), path)
        assert "\n" not in str(caught.value)
    assert {f: f.read_bytes() for f in folder.parent.rglob("*") if f.is_file()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]


def test_a_write_that_the_system_really_cuts_short_is_one_sentence(folder: Path) -> None:
    """The tensor writer reports its own kind of error, which no patched function shows."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = adapted()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, old[1]))
        with pytest.raises(FurinaError, match="Cannot write") as caught:
            furina.save(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]


def test_an_interrupted_save_leaves_the_old_folder_intact(folder: Path, monkeypatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        furina.save(adapted(), folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == ["adapter"]


def test_saving_over_an_older_adapter_replaces_it_and_over_other_files_does_not(folder) -> None:
    furina.save(adapted("lora"), folder)
    assert json.loads((folder / CONFIG_FILE).read_text())["method"] == "lora"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FurinaError, match=r"notes\.txt"):
        furina.save(adapted(), folder)
    assert json.loads((folder / CONFIG_FILE).read_text())["method"] == "lora"
    assert (folder / "notes.txt").read_text() == "mine"


def test_any_module_with_linears_can_be_saved(tmp_path: Path) -> None:
    model = chain(small("furina"))
    perturb(model)
    furina.save(model, tmp_path / "a")
    x = torch.randn(2, 3, 11, dtype=torch.float64)
    expected = model.eval()(x)
    furina.load(tmp_path / "a", furina.remove(model))
    assert torch.equal(model(x), expected)


def test_a_model_and_a_path_may_come_in_either_order(saved: Path) -> None:
    for call in (
        lambda model: furina.load(model, saved),
        lambda model: furina.load(str(saved), model, True),
        lambda model: furina.load(saved, model=model),
        lambda model: furina.load(model, path=saved, check_backbone=True),
        lambda model: furina.load(path=saved, model=model),
    ):
        model = BACKBONES["llama"]()
        assert call(model) is model and furina.is_adapted(model)
    for wrong in ((saved,), (saved, saved), (BACKBONES["llama"](),), ()):
        with pytest.raises(ConfigurationError, match="with a model and the folder of an adapter"):
            furina.load(*wrong)
