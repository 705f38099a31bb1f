"""An adapted model writes nothing that loads as another model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import furina
from furina.errors import ConfigurationError
from tests.helpers import BACKBONES, perturb, small, tokens


@pytest.mark.parametrize("copied", [False, True])
def test_an_adapted_model_refuses_save_pretrained_and_names_what_saves(
    tmp_path: Path, copied: bool
) -> None:
    model = furina.adapt(BACKBONES["llama"](), small("furina"), seed=0)
    model = copy.deepcopy(model) if copied else model
    with pytest.raises(ConfigurationError, match=r"furina\.save.*furina\.export_merged"):
        model.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_merged_model_saves_as_a_plain_one_and_a_bare_one_as_ever(tmp_path: Path) -> None:
    model = furina.adapt(BACKBONES["llama"](), small("furina"), seed=0).eval()
    perturb(model)
    furina.merge(model)
    model.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(plain(**tokens()).logits, model(**tokens()).logits)
    furina.unmerge(model)
    furina.remove(model)
    model.save_pretrained(tmp_path / "bare")
    assert not {"generate", "save_pretrained"} & model.__dict__.keys()


def test_methods_that_were_set_on_the_model_are_called_and_come_back() -> None:
    model, called = BACKBONES["llama"](), []
    model.generate = own = lambda **_: called.append(1)
    furina.adapt(model, small("furina"), seed=0)
    model.generate(x=1)
    furina.remove(model)
    assert called == [1] and model.generate is own
