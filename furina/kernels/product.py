"""The product that every linear-level method shares, as few large matmuls with its own backward.

    y = W x + b + B [(s·A dropout(x)) ⊙ g]

The update is accumulated onto W x inside its matmul, and so is its part of the gradient onto Wᵀ g.
Matmuls run in x's dtype (autocast's where that is on); A and B come as they are kept, in fp32, and
stay so where that costs less (`update_dtype`). A dropped copy of x and gated copies of h are made
again in the backward, not kept.

Shape legend: T tokens, I = d in_features, O = k out_features, N experts, r rank of one expert.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from furina.kernels.dropout import draw_dropped, drop_
from furina.kernels.dropout import dropout as drop
from furina.kernels.processor import native_bfloat16


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which fp32 stays fp32: row norms must not follow autocast to bf16."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device) else nullcontext()


def _has_autocast(device: torch.device) -> bool:
    kind = device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


FEW_TOKENS = 1
"""Up to so many tokens A and B are used in fp32 on a CPU, where no gradient is wanted."""


class Product(NamedTuple):
    """y (..., O) and h = s·A dropout(x), (T, rows of A); gradients flow through both."""

    y: Tensor
    h: Tensor


def update_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that A and B are best given in for x (..., I).

    It is x's, but on a CPU and without gradients fp32 beside 16 bits where that costs less: for a
    few tokens, and wherever the processor does not multiply those 16 bits natively.
    """
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if torch.is_grad_enabled() or x.device.type != "cpu" or not narrow:
        return x.dtype
    few = x.numel() <= FEW_TOKENS * x.shape[-1]
    return torch.float32 if few or not _is_native(x.dtype) else x.dtype


def _is_native(dtype: torch.dtype) -> bool:
    """Tell whether the processor multiplies 16 bits natively; nothing is timed in a trace."""
    if torch.compiler.is_compiling():
        return True
    return dtype == torch.bfloat16 and native_bfloat16("cpu")[0]


def low_rank_product(
    base: nn.Linear,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    scale: float = 1.0,
    gates: Tensor | None = None,
    dropout: float = 0.0,
) -> Product:
    """Return y = W x + b + B [h ⊙ g] and h = s·A dropout(x), for the probability `dropout`.

    With `gates` (..., N), B holds N blocks of r columns, and A as many blocks of rows or one for
    all. Shape: x (..., I), A (N·r, I) or (r, I), B (O, N·r).

    Without gradients h and the update are made in the dtype of A and B, or in autocast's.
    """
    leading, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
    if gates is not None:
        gates = gates.to(x.dtype).expand(*leading, -1).reshape(-1, gates.shape[-1])
    if _has_hooks(base):  # somebody listens to the linear itself
        y: Tensor = base(x)
        h, update = _update(drop(flat, dropout), a, b, scale, gates)
        return Product(y + update.view_as(y).to(y.dtype), h)
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    autocast = _has_autocast(x.device)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        flat, weight = flat.to(dtype), weight.to(dtype)
        bias, gates = (None if each is None else each.to(dtype) for each in (bias, gates))
    dropped = draw_dropped(flat, dropout) if dropout else None
    scale = scale / (1 - dropout)
    if torch.is_grad_enabled():
        y, h = _LowRankProduct.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, a, b, gates, scale, dropped
        )
    elif autocast:
        dtype = update_dtype(flat)
        with no_autocast(x.device):
            y, h = _product(flat, weight, bias, a.to(dtype), b.to(dtype), gates, scale, dropped)
    else:  # autograd's bookkeeping would cost a single token as much as a matmul
        y, h = _product(flat, weight, bias, a, b, gates, scale, dropped)
    return Product(y.view(*leading, y.shape[-1]), h)


def _has_hooks(linear: nn.Linear) -> bool:
    hooks = linear._forward_hooks, linear._forward_pre_hooks
    return bool(hooks[0] or hooks[1] or linear._backward_hooks or linear._backward_pre_hooks)


def moved_product(
    base: nn.Linear,
    x: Tensor,
    now: tuple[Tensor, Tensor],
    start: tuple[Tensor, Tensor],
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
) -> Product:
    """Return y = W x + b + (B h − B₀ h₀) and h = s·A dropout(x) for (A, B) that began at (A₀, B₀).

    Both products have the same shapes, so they round alike and the start cancels to the bit.
    """
    y: Tensor = base(x)
    x = drop(x, dropout)
    (h, update), (_, subtracted) = (_update(x, a, b, scale) for a, b in (now, start))
    return Product(y + (update - subtracted).to(y.dtype), h.reshape(-1, h.shape[-1]))


def _update(
    x: Tensor, a: Tensor, b: Tensor, scale: float, gates: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return h and B [h ⊙ g], operation by operation."""
    h = functional.linear(x, a.to(x.dtype)) * scale
    return h, functional.linear(_gated(h, gates, b), b.to(x.dtype))


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    gates: Tensor | None,
    scale: float,
    dropped: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return y, the update accumulated onto W x + b, and h in the dtype of A and B.

    Shape: x (T, I), gates (T, N) → (T, O), (T, rows of A).
    """
    h = functional.linear(_dropped(x, dropped).to(a.dtype), a)
    if scale != 1:
        h.mul_(scale)
    y = functional.linear(x, weight, bias)
    gated = _gated(h, gates, b)
    if y.dtype == b.dtype:
        return y.addmm_(gated, b.t()), h
    return y.add_(functional.linear(gated, b)), h


class _LowRankProduct(torch.autograd.Function):
    """`_product` with its own backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        gates: Tensor | None,
        scale: float,
        dropped: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Keep what the backward needs, the factors in x's dtype."""
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        a, b = a.to(x.dtype), b.to(x.dtype)
        with no_autocast(x.device):
            y, h = _product(x, weight, bias, a, b, gates, scale, dropped)
        ctx.save_for_backward(x, weight, a, b, gates, dropped, h)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_h: Tensor | None) -> tuple[Any, ...]:
        """Send gradients to x, A, B and the gates."""
        x, weight, a, b, gates, dropped, h = ctx.saved_tensors
        for_x, _, _, for_a, for_b, for_gates, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_gates = None
        with no_autocast(x.device):
            if grad_y is not None:
                grad_x = grad_y @ weight if for_x else None
                if for_b:
                    grad_b = _outer(grad_y, _gated(h, gates, b), like=b).to(ctx.dtypes[1])
                through = grad_y @ b
                if gates is not None:
                    experts = _by_expert(through, gates, b)
                    if for_gates:
                        grad_gates = (experts * _by_expert(h, gates, b)).sum(-1)
                    through = experts * gates[..., None]
                    through = through.sum(1) if h.shape[1] < b.shape[1] else through.flatten(1)
                grad_h = through if grad_h is None else through.add_(grad_h)
            if grad_h is not None:
                grad_h = grad_h if ctx.scale == 1 else grad_h * ctx.scale
                if for_a:
                    grad_a = (grad_h.t() @ _dropped(x, dropped)).to(ctx.dtypes[0])
                if for_x:
                    grad_x = torch.zeros_like(x) if grad_x is None else grad_x
                    _accumulate(grad_x, grad_h, a, dropped)
        return grad_x, None, None, grad_a, grad_b, grad_gates, None, None


def _outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """Return leftᵀ right, stored by rows or by columns as `like` is."""
    return left.t() @ right if like.is_contiguous() else (right.t() @ left).t()


def _dropped(x: Tensor, dropped: Tensor | None) -> Tensor:
    return x if dropped is None else drop_(x.clone(), dropped)


def _by_expert(h: Tensor, gates: Tensor, b: Tensor) -> Tensor:
    """Return h as (T, N, r), or (T, 1, r) where all experts share A."""
    rank = b.shape[1] // gates.shape[1]
    return h.view(len(h), h.shape[1] // rank, rank)


def _gated(h: Tensor, gates: Tensor | None, b: Tensor) -> Tensor:
    """Return h ⊙ g. Shape: (T, N·r)."""
    return h if gates is None else (_by_expert(h, gates, b) * gates[..., None]).flatten(1)


def _accumulate(grad_x: Tensor, grad_h: Tensor, a: Tensor, dropped: Tensor | None) -> None:
    """Add grad_h A to `grad_x` in place, but nothing where x was dropped."""
    if dropped is None:
        grad_x.addmm_(grad_h, a)
    elif dropped.dtype == torch.bool:
        grad_x.add_((grad_h @ a).masked_fill_(dropped, 0))
    else:
        kept = grad_x.view(-1)[dropped]
        grad_x.addmm_(grad_h, a).view(-1).index_copy_(0, dropped, kept)
