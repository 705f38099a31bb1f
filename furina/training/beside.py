"""Parameters of the backbone that are trained beside the adapter, such as an unfrozen head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.model.also_trained import also_trained


def trained_beside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what requires a gradient and is not the adapter's, by its plain name.

    Raises ConfigurationError as `also_trained`, and for numbers of 16 bits, in which small updates
    vanish.
    """
    others = also_trained(model).items()
    found = {n: p for n, p in others if isinstance(p, nn.Parameter) and p.requires_grad}
    for name, parameter in found.items():
        if parameter.dtype.itemsize < torch.float32.itemsize:
            raise ConfigurationError(
                f"{name} requires a gradient in {parameter.dtype}, in which small updates vanish: "
                "load the backbone in float32 (Trainer(precision='bf16-mixed') computes in less)."
            )
    return found


def require_held(parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Raise ConfigurationError where `state` lacks one of `parameters`, or its shape."""
    for name, parameter in parameters.items():
        if name not in state or state[name].shape != parameter.shape:
            raise ConfigurationError(
                f"The checkpoint holds no {name} of shape {tuple(parameter.shape)}, which is "
                "trained here: freeze it, or train the same parameters as then."
            )
