"""A method's name leads to one config class, the newest of those that define the same one."""

from __future__ import annotations

import pytest
from torch import nn

from furina.adapters import AdapterConfig, AdapterLinear, methods, register
from furina.adapters.base import _REGISTRY
from furina.errors import ConfigurationError
from furina.kernels.forward import ForwardTracker


def test_two_methods_of_one_name_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="registered twice"):
        register("lora")(type("Another", (AdapterConfig,), {}))
    assert methods()["lora"].__name__ == "LoRAConfig"


def test_a_method_whose_notebook_cell_runs_again_is_the_new_one() -> None:
    def cell() -> type[AdapterConfig]:
        return register("in_a_cell")(type("CellConfig", (methods()["lora"],), {}))

    try:
        assert cell() is not (again := cell()) and methods()["in_a_cell"] is again
        with pytest.raises(ConfigurationError, match="registered twice, by CellConfig and Other"):
            register("in_a_cell")(type("OtherConfig", (methods()["lora"],), {}))
    finally:
        del _REGISTRY["in_a_cell"]


def test_every_file_of_the_folder_registers_what_it_defines() -> None:
    assert {"furina", "lora"} <= set(methods())
    assert all(issubclass(config, AdapterConfig) for config in methods().values())
    built = methods()["lora"]().build(nn.Linear(3, 2), "x", ForwardTracker())
    assert isinstance(built, AdapterLinear)
