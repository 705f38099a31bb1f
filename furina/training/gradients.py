"""How strongly the auxiliary loss pulls, compared with the task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from furina.model.auxiliary import auxiliary_loss
from furina.model.inference import training_mode
from furina.model.state import state_of
from furina.training.loss import answer_loss, loss_weights, select_answers
from furina.training.preconditions import require_trainable


def gradient_ratio(
    model: nn.Module, micro_batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, float | None]:
    """Return ‖∇aux‖, ‖∇task‖ and their ratio, as `auxiliary`, `task` and `ratio`.

    The norms are over the parts of parameters that the auxiliary loss is meant to shape (for FURINA
    the routed experts' A and B), of the token-weighted losses of one optimiser step, in training
    mode. `ratio` is None where it is undefined: a method without such a loss, or no task gradient
    yet (v = 0). Gradients, mode and random state of the model are left as they were.

    Raises ConfigurationError if the adapter is merged, DataError without an answer token.
    """
    require_trainable(model)
    state = state_of(model)
    if not state.config.has_auxiliary_loss:
        return {"auxiliary": 0.0, "task": 0.0, "ratio": None}
    slices = [part for layer in state.layers.values() for part in layer.auxiliary_slices()]
    parameters = [parameter for parameter, _ in slices]
    window = [select_answers(batch) for batch in micro_batches]
    task = [torch.zeros_like(p) for p in parameters]
    auxiliary = [torch.zeros_like(p) for p in parameters]
    with training_mode(model), torch.random.fork_rng():
        for batch, weight in zip(window, loss_weights(window, None), strict=True):
            loss, _ = answer_loss(model, batch)
            pull = auxiliary_loss(model) * weight.auxiliary
            _add(auxiliary, torch.autograd.grad(pull, parameters, retain_graph=True))
            _add(task, torch.autograd.grad(loss * weight.task, parameters))
    norms = [
        torch.nn.utils.get_total_norm(
            [total[index] for total, (_, index) in zip(totals, slices, strict=True)]
        ).item()
        for totals in (auxiliary, task)
    ]
    ratio = norms[0] / norms[1] if norms[1] > 0 else None
    return {"auxiliary": norms[0], "task": norms[1], "ratio": ratio}


def _add(totals: list[Tensor], gradients: Sequence[Tensor]) -> None:
    for total, gradient in zip(totals, gradients, strict=True):
        total += gradient
