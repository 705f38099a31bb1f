from __future__ import annotations

import pytest
from torch import nn

from furina.model.inference import evaluation_mode, training_mode


@pytest.mark.parametrize(("mode", "training"), [(evaluation_mode, False), (training_mode, True)])
def test_each_module_gets_its_own_mode_back(mode, training):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(KeyError), mode(model):
        assert {module.training for module in model.modules()} == {training}
        raise KeyError
    assert [module.training for module in model.modules()] == before
