"""The auxiliary loss of the last forward, and what moves without gradients after a step."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from furina.errors import ConfigurationError
from furina.kernels.forward import Forward
from furina.kernels.product import no_autocast
from furina.model.state import state_of


def auxiliary_loss(model: nn.Module) -> Tensor:
    """Return the method's weighted auxiliary loss of the last training forward, a scalar.

    Its statistics are sums over the real tokens of that one micro-batch, over all ranks: the ranks
    add theirs in one all-reduce, and the gradient carries the factor world_size, so that after DDP
    or FSDP2 has averaged gradients two ranks equal one process with both batches. 0 for a method
    without such a loss. Calling it again gives the same loss; recomputed layers do not count twice.

    Forwards without gradients or in eval mode, such as those of validation, change nothing.

    Raises ConfigurationError if there was no training forward with gradients, or if a part of the
    model was called by itself since. Warns if no attention mask was given, because padding then
    counts as real tokens.
    """
    state = state_of(model)
    forward = _last_forward(model)
    forward.was_read = True
    if forward.loss is not None:
        return forward.loss
    if not state.config.has_auxiliary_loss:
        parameter = next(iter(state.layers.values())).base.weight
        return torch.zeros((), dtype=torch.float32, device=parameter.device)
    if forward.mask is None:
        warnings.warn(
            "No attention mask was given, so the auxiliary loss counts padding as real tokens.",
            stacklevel=2,
        )
    names = [name for name, layer in state.layers.items() if layer.records_statistics]
    missing = [name for name in names if name not in forward.records]
    if missing:
        raise ConfigurationError(
            f"{len(missing)} adapted linears, such as {missing[0]}, took no part in the last "
            "forward, so its auxiliary loss is incomplete: leave them out of the targets."
        )
    if not names:  # MixLoRA without an FFN
        return forward.tokens().to(torch.float32) * 0
    records = {name: forward.records[name] for name in names}
    with no_autocast(records[names[0]][0].device):
        parts = list(state.config.statistics(records, forward.column).values())
    tokens = forward.tokens().to(parts[0])
    *parts, tokens = _sum_over_ranks([*parts, tokens.reshape(1)])
    # Without a real token every sum is 0, and so must the gradient be, not 0/0.
    loss = state.config.auxiliary_loss(dict(zip(names, parts, strict=True)), tokens.clamp(min=1))
    if torch.is_grad_enabled():
        forward.loss = loss
        forward.records.clear()  # large; what its backward needs, the loss itself keeps
    return loss


def after_step(model: nn.Module) -> None:
    """Update what a method adapts without gradients; call it after every optimiser step.

    The layers' sums since the last call are added over the ranks in one all-reduce. Does nothing
    for most methods; FlyLoRA balances its selection and SLIM moves its clusters here.
    """
    layers = state_of(model).layers.values()
    found = [(layer, sums) for layer in layers if (sums := layer.step_statistics()) is not None]
    if not found:
        return
    with torch.no_grad():
        totals = _sum_over_ranks([sums.flatten() for _, sums in found])
        for (layer, sums), total in zip(found, totals, strict=True):
            layer.after_step(total.view_as(sums))


def auxiliary_tokens(model: nn.Module) -> Tensor:
    """Return this rank's number of real tokens in the last training forward, an integer scalar."""
    return _last_forward(model).tokens()


def _last_forward(model: nn.Module) -> Forward:
    last = state_of(model).tracker.last
    if last is None:
        raise ConfigurationError(
            "There is no auxiliary loss, since there was no forward of the whole model in training "
            "mode with gradients: call model.train() and run the model first."
        )
    return last


def _sum_over_ranks(parts: list[Tensor]) -> list[Tensor]:
    """Add every rank's tensors in one all-reduce whose backward is local, times world_size.

    The sums are the same to the bit on every rank, or what ranks make of them would drift apart.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return parts
    world = distributed.get_world_size()
    if world == 1:
        return parts
    local = torch.cat(parts)
    total = local.detach().clone()
    distributed.all_reduce(total)
    scaled = world * local
    summed = total + (scaled - scaled.detach())
    return list(torch.split(summed, [part.numel() for part in parts]))
