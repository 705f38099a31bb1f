"""The contract tests move any method's parameters well away from the start, whatever the names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from furina.adapters import AdapterLinear
from furina.kernels.forward import ForwardTracker
from tests.helpers import perturb_layer


class Product(AdapterLinear):
    """ΔW as a product of parameters, drawn with a spread, by names of their own."""

    def __init__(self, names: Sequence[str], spread: float = 1.0) -> None:
        super().__init__(nn.Linear(5, 5, dtype=torch.float64), "linear", ForwardTracker())
        self.names = names
        for name in names:
            drawn = spread * torch.randn(5, 5, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(drawn))

    def factors(self) -> None:
        return None

    def delta(self) -> Tensor:
        product = torch.eye(5, dtype=torch.float64)
        for name in self.names:
            product = product @ self.get_parameter(name).detach()
        return product

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.delta().T


@pytest.mark.parametrize("names", [("up", "down"), ("u", "core", "v"), ("up", "lora_A"), ("w",)])
@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_products_of_any_names_and_sizes_are_moved_to_a_fifth_of_the_weight(
    names: Sequence[str], spread: float
) -> None:
    torch.manual_seed(0)
    layer = Product(names, spread)
    before = {name: value.clone() for name, value in layer.adapter_tensors().items()}
    ratio = perturb_layer(layer)
    assert ratio is not None and 0.1 <= ratio <= 0.3
    for name, value in layer.adapter_tensors().items():
        assert (value != before[name]).all()


def test_an_update_that_no_parameter_moves_is_told_with_what_to_do() -> None:
    layer = Product(("w",))
    layer.delta = lambda: torch.zeros(5, 5, dtype=torch.float64)  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match=r"noise on w .*teach perturb_layer"):
        perturb_layer(layer)
