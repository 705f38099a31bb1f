"""A file of which one bit has flipped is never read as if it were whole."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
import torch

import furina
from furina.errors import AdapterFileError
from furina.model.config_file import CONFIG_FILE, TENSOR_FILE
from tests.helpers import BACKBONES, perturb, small


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = furina.adapt(BACKBONES["llama"](), small("furina"), targets=["q_proj"], seed=0)
    perturb(model)
    furina.save(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(folder: Path, words: str) -> None:
    with pytest.raises(AdapterFileError) as caught:
        furina.load(BACKBONES["llama"](), folder)
    assert words in str(caught.value)


@pytest.mark.parametrize("file", [CONFIG_FILE, TENSOR_FILE])
def test_no_flipped_bit_is_loaded(folder: Path, file: str) -> None:
    good, model = (folder / file).read_bytes(), BACKBONES["llama"]()
    generator = torch.Generator().manual_seed(0)
    header = torch.arange(0, 8 * 64)  # where the formats themselves are told apart
    anywhere = torch.randint(8 * len(good), (80,), generator=generator)
    for bit in [*header[::16].tolist(), *anywhere.tolist()]:
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        if file == CONFIG_FILE and _same_json(data, good):
            continue
        (folder / file).write_bytes(data)
        with pytest.raises(AdapterFileError) as caught:
            furina.load(model, folder)
        assert "\n" not in str(caught.value)
    assert not furina.is_adapted(model)


def _same_json(one: bytes, other: bytes) -> bool:
    """Return whether two files hold the same, such as where a blank was made another blank."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_a_changed_option_or_tensor_is_told_by_the_checksum(folder: Path) -> None:
    text = (folder / CONFIG_FILE).read_text()
    (folder / CONFIG_FILE).write_text(text.replace('"rank": 3', '"rank": 4'))
    refused(folder, f"{CONFIG_FILE} is not as furina.save wrote it, by its checksum")
    (folder / CONFIG_FILE).write_text(json.dumps(json.loads(text)))  # laid out otherwise: the same
    data = bytearray((folder / TENSOR_FILE).read_bytes())
    data[-2] ^= 1
    (folder / TENSOR_FILE).write_bytes(data)
    refused(folder, f"{TENSOR_FILE} is not as furina.save wrote it, by its checksum")


def test_an_adapter_whose_saving_was_killed_loads_whole_or_not_at_all(folder: Path) -> None:
    old, loaded = (folder / CONFIG_FILE).read_bytes(), []
    model = furina.adapt(BACKBONES["llama"](), small("lora"), targets=["q_proj"], seed=0)
    for moves in range(5):
        place = folder.with_name(str(moves))
        furina.save(furina.load(BACKBONES["llama"](), folder), place)
        if (child := os.fork()) == 0:
            replace, left = os.replace, count(moves, -1)
            os.replace = lambda *files, r=replace, n=left: r(*files) if next(n) else os._exit(1)
            with suppress(BaseException):
                furina.save(model, place)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        try:
            furina.load(BACKBONES["llama"](), place)
            loaded.append((place / CONFIG_FILE).read_bytes() == old)
        except AdapterFileError as error:
            assert f"has no {CONFIG_FILE}" in str(error)
    assert loaded == [True, True]  # before its own files were moved away
